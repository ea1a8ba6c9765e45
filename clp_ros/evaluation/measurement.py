# SPDX-License-Identifier: Apache-2.0
"""Measures the latency and memory of one checkpoint in a separate process."""

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
        device: Its device.
        dtype: As in :func:`clp_ros.policies.loading.load_policy`.
        warmup: Number of untimed chunks before the timed ones.
        compile: Whether its denoising step is compiled.
        train: Whether a training step will be timed, which needs more memory.
    """

    folder: Path
    device: str
    dtype: str
    warmup: int
    compile: bool
    train: bool


class Measurement:
    """A loaded checkpoint, and the process's memory before loading.

    Raises:
        ClpError: The checkpoint does not load, or needs more than the free memory.
    """

    def __init__(self, setting: Setting) -> None:
        from clp_ros.policies.compilation import compile_policy
        from clp_ros.policies.loading import load_policy, resolve_device

        device = resolve_device(setting.device)
        _check_room(setting, device)  # also imports all modules, before the memory is measured
        gc.collect()
        self._before = _resident()
        self.policy = load_policy(setting.folder, device, setting.dtype)
        self._observation = random_observation(self.policy)  # drawn once, because this takes as long as a small policy
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
        """Returns the milliseconds of each of ``runs`` action chunks, from images and state to actions on the CPU."""
        return [_timed(self.policy, self._predict) for _ in range(runs)]

    def peak_memory(self) -> int | None:
        """Returns the maximum number of bytes in use since the weights were loaded, including the weights.

        On CUDA, the maximum of PyTorch's allocator. On a CPU, the maximum resident memory (VmHWM) minus that before
        loading; VmHWM is reset after loading. None if the system does not allow the reset.
        """
        if self.policy.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated(self.policy.device)
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else peak - self._before

    def train_step_ms(self) -> float:
        """Returns the median of three training steps after a first one, in milliseconds: batch of 1, usual optimizer.
        Changes the weights."""
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
            (_PROC / "clear_refs").write_text("5")  # proc_pid_clear_refs(5): sets VmHWM to the current resident size
        except OSError:
            self._before = None


class Worker:
    """A process that measures one checkpoint. Leaving the context ends the process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        # The process is spawned: a forked one would share this one's memory, and could not use CUDA.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, which frees its memory."""
        self._pool.shutdown(cancel_futures=True)

    def load(self) -> dict[str, Any]:
        """Loads the checkpoint, warms it up, and returns :meth:`Measurement.described`."""
        return self._call(_load, self._setting)

    def latencies(self, runs: int) -> list[float]:
        """Calls :meth:`Measurement.latencies`."""
        return self._call(_measure, "latencies", runs)

    def peak_memory(self) -> int | None:
        """Calls :meth:`Measurement.peak_memory`."""
        return self._call(_measure, "peak_memory")

    def train_step_ms(self) -> float:
        """Calls :meth:`Measurement.train_step_ms`."""
        return self._call(_measure, "train_step_ms")

    def _call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise ClpError(
                "the process that measured the checkpoint was killed, by a signal or for lack of memory",
                where=self._setting.folder,
                hint="measure one at a time (--alone), without training (--no-train-step), or only count (--no-run)",
            ) from error


_current: Measurement | None = None  # in the worker's process


def end_with_parent() -> None:
    """Ends this process silently at an interrupt, and when its parent process ends."""
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
    """Refuses a measurement that needs more than the free memory, before the system kills processes."""
    from clp_ros.policies.loading import load_policy

    needed = needed_bytes(load_policy(setting.folder, dtype=setting.dtype, weights=False), setting.train)
    free = _free_memory(device)
    if free is not None and needed > free:
        what = "a training step's weights, gradients and Adam's moments" if setting.train else "its weights"
        hint = "leave the training step out (--no-train-step)" if setting.train else "measure one at a time (--alone)"
        raise ClpError(
            f"{what} would take {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free",
            where=setting.folder,
            hint=f"{hint}, only count (--no-run), or use a larger machine",
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
    """Returns the milliseconds of one call, with the device synchronised before and after."""
    _synchronize(policy)
    start = time.perf_counter()
    work()
    _synchronize(policy)
    return (time.perf_counter() - start) * 1e3


def _synchronize(policy: Policy) -> None:
    if policy.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(policy.device)
