# SPDX-License-Identifier: Apache-2.0
"""One checkpoint measured, in a process that holds nothing else: its time, and the memory it takes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.evaluation.flops import INSTRUCTION, needed_bytes, random_observation

if TYPE_CHECKING:
    from clp_ros.policies.base import Policy

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is measured.

    Attributes:
        folder: The checkpoint.
        device: Where it runs.
        dtype: As :func:`clp_ros.policies.loading.load_policy` takes it.
        warmup: Chunks before those that are timed.
        compile: Whether its denoising step is compiled.
        train: Whether a training step will be timed: then its memory must be there too.
    """

    folder: Path
    device: str
    dtype: str
    warmup: int
    compile: bool
    train: bool


class Measurement:
    """A loaded checkpoint, and what it took before it was loaded.

    Raises:
        ClpError: It does not load, or would not fit the memory that is free now.
    """

    def __init__(self, setting: Setting) -> None:
        from clp_ros.policies.compilation import compile_policy
        from clp_ros.policies.loading import load_policy, resolve_device

        device = resolve_device(setting.device)
        _check_room(setting, device)  # imports all there is to import, too
        gc.collect()
        self._before = _resident()
        self.policy = load_policy(setting.folder, device, setting.dtype)
        self._observation = random_observation(self.policy)  # drawing the images takes as long as a small policy
        self.compile_seconds = compile_policy(self.policy, INSTRUCTION) if setting.compile else None
        self._reset_peak()
        for _ in range(setting.warmup):
            self._predict()

    def described(self) -> dict[str, Any]:
        """``device``, ``device_name``, ``threads`` (of torch, on a CPU) and ``compile_s`` (None: not compiled)."""
        import torch

        on_cpu = self.policy.device == "cpu"
        return {
            "device": self.policy.device,
            "device_name": _cpu_name() if on_cpu else torch.cuda.get_device_name(self.policy.device),
            "threads": torch.get_num_threads() if on_cpu else None,
            "compile_s": self.compile_seconds,
        }

    def latencies(self, runs: int) -> list[float]:
        """Milliseconds of each of some action chunks, from images and state to actions on the CPU."""
        return [_timed(self.policy, self._predict) for _ in range(runs)]

    def peak_memory(self) -> int | None:
        """Most bytes held since the weights were loaded, them included.

        On CUDA what torch's allocator had given out. On a CPU by how much the process's resident memory had grown
        since before the checkpoint was loaded: VmHWM, which is set back in between, so that loading is not in it. None
        where the system does not let a process set it back.
        """
        if self.policy.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated(self.policy.device)
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else peak - self._before

    def train_step_ms(self) -> float:
        """Median of three training steps after a first; batch of 1, the usual optimizer. Changes the weights."""
        import torch

        model = self.policy.model
        actions = np.zeros((self.policy.chunk_size, self.policy.action_size), dtype=np.float32)
        optimizer = self.policy.make_optimizer()

        def step() -> None:
            self.policy.training_loss(self.policy.batch(**self._observation, actions=actions)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.train()
        torch.manual_seed(0)
        times = [_timed(self.policy, step) for _ in range(4)]
        model.eval()
        return statistics.median(times[1:])

    def _predict(self) -> None:
        self.policy.predict_chunk(**self._observation)

    def _reset_peak(self) -> None:
        gc.collect()
        if self.policy.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats(self.policy.device)
            return
        try:
            (_PROC / "clear_refs").write_text("5")  # proc_pid_clear_refs(5): sets VmHWM to what is resident now
        except OSError:
            self._before = None


class Worker:
    """A process that measures one checkpoint. A context manager: leaving it ends the process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        # Started anew, not forked: a forked process would share this one's memory, and could not use CUDA.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, which frees its memory."""
        self._pool.shutdown(cancel_futures=True)

    def load(self) -> dict[str, Any]:
        """Loads the checkpoint and warms it up; :meth:`Measurement.described`."""
        return self._call(_load, self._setting)

    def latencies(self, runs: int) -> list[float]:
        """:meth:`Measurement.latencies`."""
        return self._call(_measure, "latencies", runs)

    def peak_memory(self) -> int | None:
        """:meth:`Measurement.peak_memory`."""
        return self._call(_measure, "peak_memory")

    def train_step_ms(self) -> float:
        """:meth:`Measurement.train_step_ms`."""
        return self._call(_measure, "train_step_ms")

    def _call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise ClpError(
                "the process that measured it was killed, by a signal or for want of memory",
                where=self._setting.folder,
                fix="measure one at a time (--alone), without training (--no-train-step), or only count (--no-run)",
            ) from error


_current: Measurement | None = None  # of the worker's process


def _end_with_parent() -> None:
    """An interrupt ends this process at once and without a word; so does the end of the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    parent = multiprocessing.parent_process()
    assert parent is not None  # this process is a worker

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _load(setting: Setting) -> dict[str, Any]:
    global _current
    _current = Measurement(setting)
    return _current.described()


def _measure(what: str, *arguments: Any) -> Any:
    return getattr(_current, what)(*arguments)


def _check_room(setting: Setting, device: str) -> None:
    """Refuses what the free memory cannot hold, before the system starts killing processes."""
    from clp_ros.policies.loading import load_policy

    needed = needed_bytes(load_policy(setting.folder, dtype=setting.dtype, weights=False), setting.train)
    free = _free_memory(device)
    if free is not None and needed > free:
        what = "a training step's weights, gradients and Adam's moments" if setting.train else "its weights"
        fix = "leave the training step out (--no-train-step)" if setting.train else "measure one at a time (--alone)"
        raise ClpError(
            f"{what} would take {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free",
            where=setting.folder,
            fix=f"{fix}, only count (--no-run), or use a larger machine",
        )


def _free_memory(device: str) -> int | None:
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        return _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    return None


def _resident(field: str = "VmRSS") -> int | None:
    with contextlib.suppress(OSError):
        return _kilobytes(_PROC / "status", field)
    return None


def _kilobytes(file: Path, field: str) -> int | None:
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _timed(policy: Policy, work: Callable[[], Any]) -> float:
    """Milliseconds of one call, with the device's queue empty before and after."""
    _synchronize(policy)
    start = time.perf_counter()
    work()
    _synchronize(policy)
    return (time.perf_counter() - start) * 1e3


def _synchronize(policy: Policy) -> None:
    if policy.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(policy.device)
