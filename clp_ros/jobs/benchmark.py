# SPDX-License-Identifier: Apache-2.0
"""Measures checkpoints side by side: the columns of the paper's Table 1."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from clp_ros.jobs.progress import SILENT, Progress
from clp_ros.jobs.request import FilePaths, Request, Result


class BenchmarkRequest(Request):
    """Asks for measurements of checkpoints; see :func:`clp_ros.evaluation.benchmark.benchmark` for all attributes.

    Attributes:
        checkpoints: Checkpoint folders; the others are compared with the first.
    """

    checkpoints: Annotated[FilePaths, Field(min_length=1)]
    device: str = "auto"
    runs: Annotated[int, Field(ge=1)] = 10
    warmup: Annotated[int, Field(ge=0)] = 2
    train_step: bool = True
    dtype: Literal["auto", "float32"] = "auto"
    compiled: bool = False
    alone: bool = False
    run: bool = True


class BenchmarkResult(Result):
    """The measurements.

    Attributes:
        checkpoints: One mapping for each checkpoint.
        ratios: One mapping for each checkpoint: the first checkpoint's value divided by its own.
    """

    checkpoints: list[dict[str, Any]]
    ratios: list[dict[str, float | None]]


def run(request: BenchmarkRequest, progress: Progress = SILENT) -> BenchmarkResult:
    """Measures the checkpoints.

    Raises:
        ClpError: A checkpoint does not load, or needs too much memory.
    """
    from clp_ros.evaluation.benchmark import benchmark

    asked = dict(request)
    return BenchmarkResult(**benchmark(asked.pop("checkpoints"), **asked, progress=progress.stage))
