# SPDX-License-Identifier: Apache-2.0
"""Measures the columns of the paper's Table 1: size, FLOPs, latency and memory of checkpoints, in one run."""

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

    Latency is that of one action chunk, from images and state to actions on the CPU. Each checkpoint runs in a separate
    process, so that its memory can be measured. The checkpoints take turns, so that a drift of the machine's speed
    affects all alike.

    Args:
        folders: Checkpoint folders. The others are compared with the first.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        runs: Number of timed runs of each checkpoint.
        warmup: Number of untimed runs of each checkpoint after each loading.
        train_step: Whether to time a training step too (batch of 1, with lerobot's optimizer for this policy).
        progress: Called with each step's description.
        dtype: ``auto`` (as lerobot loads it) or ``float32``.
        compiled: Whether to compile the denoising step first (:func:`clp_ros.policies.compilation.compile_policy`).
        alone: Whether to keep only one checkpoint in memory at a time. Each is then loaded three times.
        run: Whether to run the policies. If not, only values that need no memory for weights are returned.

    Returns:
        ``checkpoints``: one mapping for each (path, family, layers, parameters, parameters_tied, trainable, gflops,
            bytes,
        dtype, and if run: device, device_name, threads, compile_s, latency_ms, latency_p90_ms, peak_memory,
        train_step_ms); ``ratios``: one mapping for each, with the first checkpoint's value divided by its own, for the
        keys of :data:`RATIOS`.

    Raises:
        ClpError: A checkpoint does not load, or needs too much memory.
    """
    from clp_ros.policies.loading import load_policy

    if not folders:
        raise ClpError("no checkpoint is given", where="checkpoints", hint="give one or more checkpoint folders")
    if runs < 1:
        raise ClpError(f"the number is {runs}", where="runs", hint="measure at least once")
    notify = progress or (lambda _: None)
    results = []
    for folder in folders:
        notify(f"counting the work of {folder}")
        results.append(describe(load_policy(folder, dtype=dtype, weights=False)))
    if run:
        settings = [Setting(Path(folder), device, dtype, warmup, compiled, train_step) for folder in folders]
        _run(settings, results, runs, alone, notify)
    keys = [key for key in RATIOS if key in results[0]]
    ratios = [{key: _ratio(results[0][key], result[key]) for key in keys} for result in results]
    return {"checkpoints": results, "ratios": ratios}


def _run(
    settings: Sequence[Setting],
    results: Sequence[dict[str, Any]],
    runs: int,
    alone: bool,
    notify: Callable[[str], None],
) -> None:
    latencies: list[list[float]] = [[] for _ in settings]
    peaks: list[list[int | None]] = [[] for _ in settings]

    def load(index: int) -> Worker:
        notify(f"loading {settings[index].folder}")
        worker = stack.enter_context(Worker(settings[index]))
        results[index] |= worker.load()
        return worker

    def train(index: int, worker: Worker) -> None:
        if settings[index].train:
            notify(f"training {settings[index].folder}")
            results[index]["train_step_ms"] = worker.train_step_ms()

    if alone:
        turns = min(_ALONE_TURNS, runs)
        for turn in range(turns):
            for index in range(len(settings)):
                with ExitStack() as stack:
                    worker = load(index)
                    notify(f"turn {turn + 1} of {turns}")
                    latencies[index] += worker.latencies(-(-runs // turns))
                    peaks[index].append(worker.peak_memory())
                    if turn == turns - 1:
                        train(index, worker)
    else:
        with ExitStack() as stack:
            workers = [load(index) for index in range(len(settings))]
            for run in range(runs):
                notify(f"run {run + 1} of {runs}")
                for worker, times in zip(workers, latencies, strict=True):
                    times += worker.latencies(1)
            for worker, held in zip(workers, peaks, strict=True):
                held.append(worker.peak_memory())
            # In reverse order: the memory of each was checked next to the weights of those before it.
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
