# SPDX-License-Identifier: Apache-2.0
"""Makes a whole checkpoint of a base and a task head."""

from __future__ import annotations

from clp_ros.jobs.extract_head import ExtractHeadResult
from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request


class ApplyHeadRequest(Request):
    """Asks for a whole checkpoint of a base and a head.

    Attributes:
        base: The checkpoint from which the fine-tuning started.
        head: A head of it.
        output: The checkpoint folder to write.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    base: FilePath
    head: FilePath
    output: FilePath
    overwrite: bool = False


class ApplyHeadResult(ExtractHeadResult):
    """The checkpoint that was made with a head. The fields are those of the head, but ``output``, its folder."""


def run(request: ApplyHeadRequest, progress: Progress = SILENT) -> ApplyHeadResult:
    """Writes the fine-tuned checkpoint again.

    Raises:
        ClpError: See :func:`clp_ros.training.heads.apply_head`.
    """
    from clp_ros.training.heads import apply_head

    progress.stage("writing the checkpoint")
    return ApplyHeadResult.of(request.output, apply_head(request.base, request.head, request.output, request.overwrite))
