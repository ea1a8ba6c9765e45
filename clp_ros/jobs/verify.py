# SPDX-License-Identifier: Apache-2.0
"""Checks that stock lerobot loads a checkpoint strictly, that it runs, and that its manifest is correct."""

from __future__ import annotations

from typing import Any

from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePath, Request, Result


class VerifyRequest(Request):
    """Asks for the verification of a checkpoint.

    Attributes:
        checkpoint: Checkpoint folder, or a Hub repository.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        compiled: Whether to also compile the policy and compare its actions.
    """

    checkpoint: FilePath
    device: str = "cpu"
    compiled: bool = False


class VerifyResult(Result):
    """The results of the checks. The fields are those of :func:`clp_ros.evaluation.verify.verify`."""

    path: str
    family: str
    layers: dict[str, int]
    parameters: int
    pruned: bool
    source: str
    chunk: list[int]
    cameras: list[str]
    left_out_cameras: list[str]
    raw_features: list[str]
    compiled_difference: float | None = None
    compiled_tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the result, without the fields about compilation if it was not requested."""
        return self.model_dump(mode="json", exclude_none=True)


def run(request: VerifyRequest, progress: Progress = SILENT) -> VerifyResult:
    """Verifies the checkpoint.

    Raises:
        ClpError: A check fails. The message names it.
    """
    from clp_ros.evaluation.verify import verify

    progress.stage(f"loading {request.checkpoint}")
    return VerifyResult(**verify(request.checkpoint, request.device, request.compiled))
