# SPDX-License-Identifier: Apache-2.0
"""Writes what a fine-tuning changed in its base: a task head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result

if TYPE_CHECKING:
    from clp_ros.training.heads import Head


class ExtractHeadRequest(Request):
    """Asks for the head of a fine-tuned checkpoint.

    Attributes:
        base: The checkpoint from which the fine-tuning started.
        finetuned: The fine-tuned checkpoint.
        output: The head folder to write.
        overwrite: Whether an output folder that is not empty is replaced.
    """

    base: FilePath
    finetuned: FilePath
    output: FilePath
    overwrite: bool = False


class ExtractHeadResult(Result):
    """A head.

    Attributes:
        output: The folder, absolute.
        tensors: Number of tensors in the head.
        parameters: Number of values in them; ``total``: in the whole checkpoint.
        base: The fingerprint of the base.
    """

    output: str
    tensors: int
    parameters: int
    total: int
    base: str

    @classmethod
    def of(cls, output: Path, head: Head) -> Self:
        """Returns the result for a head that was written to, or applied in, a folder."""
        return cls(
            output=str(output.absolute()),
            tensors=len(set(head.names.values())),
            parameters=head.parameters,
            total=head.total,
            base=head.base.fingerprint,
        )


def run(request: ExtractHeadRequest, progress: Progress = SILENT) -> ExtractHeadResult:
    """Writes the tensors and files in which a fine-tuned checkpoint differs from its base.

    Raises:
        ClpError: See :func:`clp_ros.training.heads.extract_head`.
    """
    from clp_ros.training.heads import extract_head

    progress.stage("comparing the checkpoints")
    return ExtractHeadResult.of(
        request.output, extract_head(request.base, request.finetuned, request.output, request.overwrite)
    )
