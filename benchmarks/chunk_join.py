# SPDX-License-Identifier: Apache-2.0
"""Measures how long it takes to join a chunk to the trajectory, and how long the lock is held.

    python benchmarks/chunk_join.py [--chunks 300] [--noise 5]

The robot has two ALOHA arms (14 joints). A scripted expert with white noise (mrad) predicts chunks of 100 steps, one at
each control step or every 10 steps, in every mode. With a chunk at each step, an ensemble has up to 98 chunks. `join`
is the time from the chunk to the content of the messages, in wall time and in processor time. Only the wall time
includes other work of the computer. `locked` is the processor time during which the lock is held that the watchdog and
~/stop need, without publishing.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from results import Table, add_output_argument, write_results

from clp_ros.control.chunk_schedule import MODES, ScheduleSettings
from clp_ros.control.output import TrajectoryOutput
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.trajectory import joint_positions
from clp_ros.simulation.closed_loop import START_NS
from clp_ros.simulation.motion import through

STEPS = 100
GOAL_JOIN_MS, GOAL_LOCKED_MS = 10.0, 1.0


def main() -> int:
    """Prints a Markdown table. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=300, help="number of chunks in each row (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=5.0, help="mrad (default: %(default)s)")
    add_output_argument(parser)
    options = parser.parse_args()
    columns = ("join p50", "join p99", "processor p50", "processor p99", "locked p99")
    record = Table("mode, a chunk every", dict.fromkeys(columns, "ms"))
    print("| mode | a chunk every | join p50 ms | join p99 ms | processor p50 ms | processor p99 ms | locked p99 ms |")
    print("| --- " * 7 + "|")
    missed = False
    for mode in MODES:
        for every in (1, 10):
            figures = measured(mode, every, options.chunks, options.noise)
            print(f"| {mode} | {every} steps | " + " | ".join(f"{one:.2f}" for one in figures) + " |", flush=True)
            record.rows[f"{mode}, {every} steps"] = dict(zip(columns, figures, strict=True))
            missed |= figures[3] > GOAL_JOIN_MS or figures[4] > GOAL_LOCKED_MS
    print(f"\nprocessor p99 at most {GOAL_JOIN_MS:g} ms, locked p99 at most {GOAL_LOCKED_MS:g} ms: ", end="")
    print("missed" if missed else "reached")
    write_results(options.output, [record])
    return 1 if missed else 0


def measured(mode: str, every: int, chunks: int, noise: float) -> tuple[float, ...]:
    """Returns p50 and p99 of the join, both in processor time, and p99 of the locked time, in milliseconds."""
    embodiment, now = load_embodiment("aloha_bimanual"), START_NS
    rng = np.random.default_rng(0)
    lower, upper = (np.array([getattr(one, side) for one in embodiment.joints]) for side in ("lower", "upper"))
    reach = np.minimum((upper - lower) / 2, 0.8)
    waypoints = (lower + upper) / 2 + reach * rng.uniform(-1, 1, (200, embodiment.action_size))
    motion = through(embodiment, waypoints)
    sigma = noise / 1e3 * np.where(upper - lower < 0.1, 0.1, 1.0)
    output = TrajectoryOutput(embodiment, ScheduleSettings(mode=mode), lambda _: None, lambda: now)
    offset = joint_positions(np.zeros(embodiment.action_size), embodiment)
    scale = joint_positions(np.ones(embodiment.action_size), embodiment) - offset
    here, times = waypoints[0], []
    for number in range(chunks + 20):
        now = START_NS + number * every * embodiment.period_ns + 7_000_000 * (number % 3)
        seconds = (now - START_NS) / 1e9 + np.arange(1, STEPS + 1) * embodiment.period_ns / 1e9
        chunk = motion.at(seconds) + sigma * rng.standard_normal((STEPS, len(sigma)))
        begun, worked = time.perf_counter(), time.thread_time()
        planned = output.plan(chunk, now, (here - offset) / scale)
        joined, done = time.perf_counter(), time.thread_time()
        output.send(planned)
        times.append((joined - begun, done - worked, time.thread_time() - done))
        here = planned.plan.after.reference.sample(now + every * embodiment.period_ns)[0]
    wall, processor, locked = 1e3 * np.array(times[20:]).T
    return (*np.percentile(wall, [50, 99]), *np.percentile(processor, [50, 99]), float(np.percentile(locked, 99)))


if __name__ == "__main__":
    sys.exit(main())
