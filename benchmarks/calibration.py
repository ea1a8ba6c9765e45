# SPDX-License-Identifier: Apache-2.0
"""Measures calibration's time relative to the policy's forward pass, and its memory.

    python benchmarks/calibration.py CHECKPOINT [--samples 64] [--passes N] [--device auto]

Frames are random images, states and actions that fit the checkpoint. Time and memory do not depend on their values.
With ``--passes``, only that many frames run through the policy, and their hidden states are used again for the other
samples. "CKA" includes all work on the hidden states: masking, checks, CKA of adjacent layers and of all pairs,
distances, and the final scores. Memory is the peak of the whole run including loading, sampled every 50 ms (Linux).
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import numpy as np
import torch
from results import Table, add_output_argument, write_results

from clp_ros.calibration.calibrate import Calibrator
from clp_ros.policies.base import HiddenStates, Policy
from clp_ros.policies.loading import load_policy

TASK = "Pick up the cube and put it into the box."


def main() -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--passes", type=int, help="maximum number of forward passes (default: one for each sample)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add_output_argument(parser)
    args = parser.parse_args()

    memory = Memory()
    policy = load_policy(args.checkpoint, args.device, mapped=True)
    calibrator = Calibrator(policy, TASK, frames=args.samples)
    rng = np.random.default_rng(0)
    forward, sums = Clock(policy.device), Clock(policy.device)
    passes = args.samples if args.passes is None else args.passes
    for index in range(-1, args.samples):
        if index < passes:
            batch = random_batch(policy, rng)
            with forward:
                states = policy.hidden_states(batch, np.random.default_rng([0, index + 1]))
        if index < 0:  # the first pass reads the weights from the disk
            forward.wall, forward.cpu = [], []
            continue
        # A copy of the lists, because add_states empties them.
        given = {name: HiddenStates(list(one.layers), one.modalities) for name, one in states.items()}
        with sums:
            calibrator.add_states(given, index)
    with sums:
        calibration = calibrator.finish({})
    peaks = memory.stop()

    print(
        f"{args.checkpoint.name} on {policy.device}, {torch.get_num_threads()} threads, {args.samples} samples, "
        f"{len(forward.wall)} of them through the policy"
    )
    print(f"tokens {calibration.meta['tokens']}, of these for all pairs {calibration.meta['matrix_tokens']}")
    print(f"{'seconds a sample':20}{'forward':>10}{'CKA':>10}{'CKA / forward':>16}")
    times = Table("time", {"forward pass": "s a sample", "CKA": "s a sample", "CKA / forward pass": None})
    for name, ours, theirs in (("wall", sums.wall, forward.wall), ("processor", sums.cpu, forward.cpu)):
        mean, base = sum(ours) / args.samples, sum(theirs) / len(theirs)
        times.rows[name] = {"forward pass": base, "CKA": mean, "CKA / forward pass": mean / base}
        print(f"{name:20}{base:10.3f}{mean:10.3f}{mean / base:16.1%}")
    print(", ".join(f"peak {name} {peak / 2**30:.2f} GiB" for name, peak in peaks.items()))
    memory_table = Table("memory", {"peak": "GiB"}, {name: {"peak": peak / 2**30} for name, peak in peaks.items()})
    write_results(args.output, [times, memory_table])


def random_batch(policy: Policy, rng: np.random.Generator) -> dict:
    """A frame of noise that fits the policy."""
    sizes = policy.camera_sizes
    images = {name: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for name, size in sizes.items()}
    state = rng.standard_normal(policy.state_size, dtype=np.float32)
    actions = rng.standard_normal((policy.chunk_size, policy.action_size), dtype=np.float32)
    return policy.batch(images, state, TASK, actions, np.zeros(policy.chunk_size, dtype=bool))


class Clock:
    """Measures wall-clock and processor seconds of each block, including the work of a GPU."""

    def __init__(self, device: str) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._device = torch.device(device)

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        for times, start, end in zip((self.wall, self.cpu), self._start, self._now(), strict=True):
            times.append(end - start)

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()


class Memory:
    """Samples this process's peak resident memory, by kind, in bytes."""

    def __init__(self) -> None:
        self._peaks = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """Ends the sampling and returns the peaks."""
        self._stop.set()
        self._thread.join()
        return self._peaks

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self._peaks:
                    self._peaks[name] = max(self._peaks[name], int(value.split()[0]) * 1024)


if __name__ == "__main__":
    main()
