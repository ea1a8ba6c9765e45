# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 1, measured: size, work, time and memory of checkpoints, side by side in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.evaluation.flops import describe
from clp_ros.evaluation.measurement import Setting, Worker

RATIOS = ("latency_ms", "gflops", "parameters", "parameters_tied", "trainable", "train_step_ms", "peak_memory", "bytes")
_ALONE_TURNS = 3


def benchmark(
    folders: Sequence[str | Path],
    device: str = "auto",
    runs: int = 10,
    warmup: int = 2,
    train_step: bool = True,
    progress: Callable[[str], None] | None = None,
    *,
    dtype: str = "auto",
    compiled: bool = False,
    alone: bool = False,
    run: bool = True,
) -> dict[str, Any]:
    """Measures checkpoints.

    Latency is that of one action chunk, from images and state to actions on the CPU. Each checkpoint runs in a process
    of its own, so that its memory is its own; they take turns, so that a machine whose speed drifts does so for all.

    Args:
        folders: Checkpoint folders; the first is what the others are compared with.
        device: Where to run.
        runs: Timed runs of each.
        warmup: Runs of each before those, whenever it was loaded.
        train_step: Whether to time a training step (batch of 1, the optimizer lerobot trains this policy with) too.
        progress: Told what is being done.
        dtype: ``auto`` (as lerobot loads it) or ``float32``.
        compiled: Whether to compile the denoising step first (:func:`clp_ros.policies.compilation.compile_policy`).
        alone: Whether to hold only one checkpoint in memory at a time: each is loaded anew for each of three turns.
        run: Whether to run anything: without, only what takes no memory for weights is told.

    Returns:
        ``checkpoints``: one mapping each (path, family, layers, parameters, parameters_tied, trainable, gflops, bytes,
        dtype, and if run: device, device_name, threads, compile_s, latency_ms, latency_p90_ms, peak_memory,
        train_step_ms); ``ratios``: one mapping each, of the first's value over its own, for those of :data:`RATIOS`.

    Raises:
        ClpError: A checkpoint does not load, or does not fit the memory.
    """
    from clp_ros.policies.loading import load_policy

    if not folders:
        raise ClpError("no checkpoint to measure", fix="give one or more checkpoint folders")
    if runs < 1:
        raise ClpError(f"runs is {runs}", fix="measure at least once")
    say = progress or (lambda _: None)
    results = []
    for folder in folders:
        say(f"counting the work of {folder}")
        results.append(describe(load_policy(folder, dtype=dtype, weights=False)))
    if run:
        settings = [Setting(Path(folder), device, dtype, warmup, compiled, train_step) for folder in folders]
        _run(settings, results, runs, alone, say)
    keys = [key for key in RATIOS if key in results[0]]
    ratios = [{key: _ratio(results[0][key], result[key]) for key in keys} for result in results]
    return {"checkpoints": results, "ratios": ratios}


def _run(
    settings: Sequence[Setting],
    results: Sequence[dict[str, Any]],
    runs: int,
    alone: bool,
    say: Callable[[str], None],
) -> None:
    latencies: list[list[float]] = [[] for _ in settings]
    peaks: list[list[int | None]] = [[] for _ in settings]

    def load(index: int) -> Worker:
        say(f"loading {settings[index].folder}")
        worker = stack.enter_context(Worker(settings[index]))
        results[index] |= worker.load()
        return worker

    def train(index: int, worker: Worker) -> None:
        if settings[index].train:
            say(f"training {settings[index].folder}")
            results[index]["train_step_ms"] = worker.train_step_ms()

    if alone:
        turns = min(_ALONE_TURNS, runs)
        for turn in range(turns):
            for index in range(len(settings)):
                with ExitStack() as stack:
                    worker = load(index)
                    say(f"turn {turn + 1} of {turns}")
                    latencies[index] += worker.latencies(-(-runs // turns))
                    peaks[index].append(worker.peak_memory())
                    if turn == turns - 1:
                        train(index, worker)
    else:
        with ExitStack() as stack:
            workers = [load(index) for index in range(len(settings))]
            for run in range(runs):
                say(f"run {run + 1} of {runs}")
                for worker, times in zip(workers, latencies, strict=True):
                    times += worker.latencies(1)
            for worker, held in zip(workers, peaks, strict=True):
                held.append(worker.peak_memory())
            # The last first: for each, the memory was found to do beside the weights of those before it.
            for index, worker in reversed(list(enumerate(workers))):
                train(index, worker)
                worker.close()
    for result, times, held in zip(results, latencies, peaks, strict=True):
        result["latency_ms"] = statistics.median(times)
        result["latency_p90_ms"] = float(np.percentile(times, 90))
        known = [peak for peak in held if peak is not None]
        result["peak_memory"] = max(known) if len(known) == len(held) else None


def _ratio(first: float | None, own: float | None) -> float | None:
    return first / own if first is not None and own else None
