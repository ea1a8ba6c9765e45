# SPDX-License-Identifier: Apache-2.0
"""How smoothly chunks reach the joints: clp_ros's schedule against the two usual ways, at four latencies.

    python benchmarks/chunk_control.py [--motions 3] [--robots ur5 ...]

A scripted expert moves through random waypoints and answers with chunks of 50 steps after a latency (plus or minus a
fifth). What is measured is what simulated joint_trajectory_controllers command at 500 Hz, anywhere in a run: the
largest jump in position and in velocity, the distance to the expert, and when the robot is where the motion ends. A row
is of all robots. Simulated time: the computer's load changes nothing.

The usual ways: `points` sends one point a control step, positions only, and asks the policy when none is left. `chunks`
sends each chunk whole, with velocities that are zero at its ends, and asks when it has been executed. Both execute 40
steps. clp_ros's modes: a chunk every 40 steps, every 10, and at once when the last is sent.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

from clp_ros.control.chunk_schedule import MODES, Mode, ScheduleSettings
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.trajectory import split_trajectory
from clp_ros.simulation.closed_loop import START_NS, Controllers, Expert, ScheduledSender, Sender, play
from clp_ros.simulation.motion import Motion, through

LATENCIES_MS = (0, 50, 150, 300)
STEPS, EXECUTED = 50, 40
STEP_NS = 2_000_000
GOAL_POSITION, GOAL_VELOCITY = 1e-3, 0.05
# Control steps from one chunk to the next; 10: the execution length of the paper.
PACES = {"40 steps": EXECUTED, "10 steps": 10, "at once": 0}
ROBOTS = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")


class Points:
    """One point a control step."""

    def __init__(self, robot: Controllers) -> None:
        self.counts: Counter[str] = Counter()
        self._robot = robot
        self._left: list[np.ndarray] = []

    def due(self, now_ns: int) -> bool:
        """When no point is left, and the last one has been executed."""
        return not self._left

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Takes the steps to execute."""
        self.counts["chunks"] += 1
        self._left = list(positions[:EXECUTED])

    def tick(self, now_ns: int) -> None:
        """Sends the next one."""
        if self._left:
            seconds = np.array([self._robot.embodiment.period_ns / 1e9])
            for trajectory in split_trajectory(seconds, self._left.pop(0)[None], self._robot.embodiment):
                self._robot.receive(trajectory, now_ns)


class Chunks:
    """Each chunk whole, at rest at its ends."""

    def __init__(self, robot: Controllers) -> None:
        self.counts: Counter[str] = Counter()
        self._robot = robot
        self._end_ns = START_NS

    def due(self, now_ns: int) -> bool:
        """When the last one has been executed."""
        return now_ns >= self._end_ns

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Sends it."""
        self.counts["chunks"] += 1
        period = self._robot.embodiment.period_ns
        positions = positions[:EXECUTED]
        velocities = np.gradient(positions, period / 1e9, axis=0)
        velocities[[0, -1]] = 0
        seconds = np.arange(1, len(positions) + 1) * period / 1e9
        for trajectory in split_trajectory(seconds, positions, self._robot.embodiment, velocities):
            self._robot.receive(trajectory, now_ns)
        self._end_ns = now_ns + len(positions) * period

    def tick(self, now_ns: int) -> None:
        """Nothing more."""


def scheduled(mode: Mode, replan_steps: int) -> Callable[[Controllers, float], Sender]:
    """clp_ros's own way."""

    def make(robot: Controllers, latency_s: float) -> Sender:
        settings = ScheduleSettings(mode=mode)
        return ScheduledSender(robot, settings, replan_steps=replan_steps, latency_s=1.2 * latency_s)

    return make


WAYS: dict[tuple[str, str], Callable[[Controllers, float], Sender]] = {
    ("points", "40 steps"): lambda robot, _: Points(robot),
    ("chunks", "40 steps"): lambda robot, _: Chunks(robot),
    **{(mode, pace): scheduled(mode, steps) for pace, steps in PACES.items() for mode in MODES},
}


def motion_of(embodiment: Embodiment, seed: int) -> tuple[Motion, np.ndarray]:
    """A motion through random waypoints, and where it begins."""
    rng = np.random.default_rng(seed)
    lower, upper = (np.array([getattr(joint, side) for joint in embodiment.joints]) for side in ("lower", "upper"))
    reach = np.minimum((upper - lower) / 2, 0.6)
    waypoints = (lower + upper) / 2 + reach * rng.uniform(-1, 1, (4, embodiment.action_size))
    return through(embodiment, waypoints), waypoints[0]


def main() -> int:
    """Prints a Markdown table; returns 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--motions", type=int, default=3, help="random motions of each robot (default: %(default)s)")
    parser.add_argument("--robots", nargs="+", choices=ROBOTS, default=ROBOTS, help="(default: all)")
    options = parser.parse_args()
    print(
        "| latency ms | way | a chunk every | position jump rad | velocity jump rad/s | tracking RMS rad | late "
        "| refused | slowed down | time / expert's |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    embodiments = [load_embodiment(name) for name in options.robots]
    missed = []
    for latency_ms in LATENCIES_MS:
        # Each robot's time by the faster of the usual ways.
        usual = np.full(len(embodiments), np.inf)
        for (way, pace), make in WAYS.items():
            found = [[run(one, seed, latency_ms, make) for seed in range(options.motions)] for one in embodiments]
            position, velocity, rms, late, refused, slowed, time = np.moveaxis(np.array(found), -1, 0)
            print(
                f"| {latency_ms} | {way} | {pace} | {position.max():.1e} | {velocity.max():.3f} "
                f"| {np.sqrt((rms**2).mean()):.4f} | {late.sum():.0f} | {refused.sum():.0f} | {slowed.sum():.0f} "
                f"| {time.mean():.3f} |",
                flush=True,
            )
            if way in ("points", "chunks"):
                usual = np.minimum(usual, time.mean(axis=1))
                continue
            good = (position.max(axis=1) <= GOAL_POSITION) & (velocity.max(axis=1) <= GOAL_VELOCITY)
            good &= (late + refused).sum(axis=1) == 0
            good &= np.isfinite(time).all(axis=1) & (time.mean(axis=1) <= usual + 0.01)
            missed += [
                f"{name} at {latency_ms} ms, {way}, {pace}"
                for name, ok in zip(options.robots, good, strict=True)
                if not ok
            ]
    result = f"missed by {'; '.join(missed)}" if missed else "reached by every mode"
    print(
        f"\njumps of at most {GOAL_POSITION:g} rad and {GOAL_VELOCITY:g} rad/s, no chunk late or refused, every motion "
        f"finished, no robot slower than by the usual ways: {result}"
    )
    return 1 if missed else 0


def run(
    embodiment: Embodiment, seed: int, latency_ms: int, make: Callable[[Controllers, float], Sender]
) -> tuple[float, ...]:
    """One run: jumps, tracking RMS, chunks late, refused and slowed down, and the time relative to the expert's."""
    motion, start = motion_of(embodiment, seed)
    robot = Controllers(embodiment, start)
    sender = make(robot, latency_ms / 1e3)
    rng = np.random.default_rng(seed)
    result = play(
        robot,
        Expert(motion, embodiment, STEPS),
        sender,
        lambda: round(latency_ms * 1e6 * rng.uniform(0.8, 1.2)),
        STEP_NS,
        4 * motion.seconds,
    )
    counts = (sender.counts[what] for what in ("late", "refused", "slowed down"))
    finished = np.inf if result.finished_s is None else result.finished_s
    return (*result.jumps(), result.tracking_rms(), *counts, finished / motion.seconds)


if __name__ == "__main__":
    sys.exit(main())
