# SPDX-License-Identifier: Apache-2.0
"""Separates what a fine-tuning changed from its base, and puts both together again."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


class HeadResult(Result):
    """A head, or the checkpoint that was made with it.

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


def extract(request: ExtractHeadRequest, progress: Progress = SILENT) -> HeadResult:
    """Writes the tensors and files in which a fine-tuned checkpoint differs from its base.

    Raises:
        ClpError: See :func:`clp_ros.training.heads.extract_head`.
    """
    from clp_ros.training.heads import extract_head

    progress.stage("comparing the checkpoints")
    return _result(request, extract_head(request.base, request.finetuned, request.output, request.overwrite))


def apply(request: ApplyHeadRequest, progress: Progress = SILENT) -> HeadResult:
    """Writes the fine-tuned checkpoint again.

    Raises:
        ClpError: See :func:`clp_ros.training.heads.apply_head`.
    """
    from clp_ros.training.heads import apply_head

    progress.stage("writing the checkpoint")
    return _result(request, apply_head(request.base, request.head, request.output, request.overwrite))


def _result(request: ExtractHeadRequest | ApplyHeadRequest, head: Head) -> HeadResult:
    return HeadResult(
        output=str(request.output.absolute()),
        tensors=len(set(head.names.values())),
        parameters=head.parameters,
        total=head.total,
        base=head.base.fingerprint,
    )
