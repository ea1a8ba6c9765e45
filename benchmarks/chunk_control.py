# SPDX-License-Identifier: Apache-2.0
"""Compares clp_ros's chunk schedule with the usual ways to execute chunks, with policies that are not noise-free.

    python benchmarks/chunk_control.py [--robots ur5 ...] [--noise 0 5 bfloat16 ...] [--latency 0 150 ...] [--lag 40]
        [--ways replace ensemble ...] [--paces "40 steps" ...] [--motions 1] [--results FILE.jsonl]

A scripted expert moves through random waypoints. It returns chunks of 50 steps after a latency (plus or minus a fifth).
Each step gets white noise, in mrad (0.1 mm for a finger's joint), or is rounded to bfloat16. The benchmark measures the
commands of simulated joint_trajectory_controllers at 1 kHz, by their own interpolation: the largest jump in position
and in velocity, the used share of the limits, the root mean square distance from the noise-free expert's path, and the
time at which the robot reaches the end of the motion. Time is simulated, so the load of the computer has no effect.

The usual ways: `points` sends one point at each control step, positions only, and requests a chunk when none is left.
`chunks` sends complete chunks, at rest at both ends, and requests the next one after the execution. `async` is
lerobot's asynchronous inference: a queue that is refilled when half is left, with a weighted mean of overlapping steps.
`act` is ACT's temporal ensembling: the mean of all chunks at each control step, with as many chunks as the latency
allows. `unblocked` sends a chunk every 10 steps, with velocities and without the steps that have passed.
clp_ros's modes use a chunk every 40 steps, a chunk every 10 steps, or request the next one when the last is sent.

With --lag, the joints lag behind their commands, and the controllers have interpolate_from_desired_state: false, their
default: a new trajectory begins at the measured state, unless it has points that have passed.

With --results, each run is a line of JSON in a file, and runs that are in the file are skipped. A long matrix can be
split by its arguments, interrupted and resumed. --summary prints the table of a file. --series follows the recorded
chunks of a trained policy instead.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from results import Table, add_output_argument, write_results

from clp_ros.control.chunk_schedule import MODES, ChunkSchedule, Mode, ScheduleSettings
from clp_ros.control.safety import Limits, excess
from clp_ros.core.errors import ClpError
from clp_ros.policies.rtc import MARGIN_STEPS
from clp_ros.robots.embodiment import Embodiment, load_embodiment
from clp_ros.robots.trajectory import split_trajectory
from clp_ros.simulation.closed_loop import START_NS, Controllers, Expert, Run, ScheduledSender, Sender, play
from clp_ros.simulation.motion import Motion, through

LATENCIES_MS = (0, 50, 150, 300)
NOISES = ("0", "0.5", "1", "2", "5", "bfloat16")
STEPS, EXECUTED = 50, 40
STEP_NS = 1_000_000
GOAL_POSITION, GOAL_VELOCITY, GOAL_TIME = 1e-3, 0.05, 1.02
# Distance from the end of the motion at which it is reached, rad or m. Noise of 5 mrad moves a resting robot too.
THERE = 0.02
# Control steps from one chunk to the next; 10: the execution length of the paper.
PACES = {"40 steps": EXECUTED, "10 steps": 10, "at once": 0}
ROBOTS = ("ur5", "ur10e", "aloha_single", "aloha_bimanual")
# A finger's noise in m for an arm's noise in rad: about the same share of a few cm as of a few rad.
FINGER = 0.1
# The expert estimates its progress mostly by the clock. With a weight of 1e-2, noise of 5 mrad makes this estimate
# drift by -6 to +5 % of the time, differently for each motion, and the benchmark would measure the expert.
CLOCK_WEIGHT = 1e-1
# Before, the robot has no last command to continue. The controllers need 0.2 s to start.
_STARTED_S = 0.5


class NoisyExpert(Expert):
    """An expert with the noise of a trained policy."""

    def __init__(self, motion: Motion, embodiment: Embodiment, noise: str, seed: int) -> None:
        super().__init__(motion, embodiment, STEPS, CLOCK_WEIGHT)
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        joints = embodiment.joints
        self._offset, self._scale = (np.array([getattr(one, part) for one in joints]) for part in ("offset", "scale"))
        self.sigma = sigma(embodiment, noise)

    def chunk(self, positions: np.ndarray, now_ns: int) -> np.ndarray:
        """See :class:`Expert`."""
        right = super().chunk(positions, now_ns)
        if self._noise == "bfloat16":
            return self._offset + self._scale * bfloat16((right - self._offset) / self._scale)
        return right + self.sigma * self._rng.standard_normal(right.shape)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def sigma(embodiment: Embodiment, noise: str) -> np.ndarray:
    """Returns the standard deviation of a step, (joints,) rad or m; for bfloat16, that of values around 1."""
    mrad = 2**-9 / np.sqrt(3) * 1e3 if noise == "bfloat16" else float(noise)
    is_finger = np.array([joint.upper - joint.lower < 0.1 for joint in embodiment.joints])
    return mrad / 1e3 * np.where(is_finger, FINGER, 1.0)


class Points:
    """Sends one point at each control step, and requests a chunk when none is left."""

    def __init__(self, robot: Controllers) -> None:
        self.counts: Counter[str] = Counter()
        self._robot = robot
        self._left: list[np.ndarray] = []

    def due(self, now_ns: int) -> bool:
        """See :class:`Sender`."""
        return not self._left

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Stores the steps to execute."""
        self.counts["chunks"] += 1
        self._left = list(positions[:EXECUTED])

    def tick(self, now_ns: int) -> None:
        """Sends the next one."""
        if self._left:
            self._send(self._left.pop(0), now_ns)

    def _send(self, point: np.ndarray, now_ns: int) -> None:
        seconds = np.array([self._robot.embodiment.period_ns / 1e9])
        for trajectory in split_trajectory(seconds, point[None], self._robot.embodiment):
            self._robot.receive(trajectory, now_ns)


class Async(Points):
    """lerobot 0.6's asynchronous inference (``async_inference/robot_client.py``) with its defaults."""

    def __init__(self, robot: Controllers) -> None:
        super().__init__(robot)
        self._queue: dict[int, np.ndarray] = {}
        self._latest = 0
        self._observed: dict[int, int] = {}

    def due(self, now_ns: int) -> bool:
        """Returns whether half of a chunk or less is left (``chunk_size_threshold`` 0.5)."""
        if len(self._queue) > STEPS // 2:
            return False
        self._observed[now_ns] = self._latest
        return True

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Combines the chunk with the queue (``weighted_average``)."""
        self.counts["chunks"] += 1
        first = self._observed[observed_ns]
        new = {first + 1 + step: position for step, position in enumerate(positions) if first + 1 + step > self._latest}
        self._queue = {
            step: 0.3 * self._queue[step] + 0.7 * one if step in self._queue else one for step, one in new.items()
        }

    def tick(self, now_ns: int) -> None:
        """Sends the next one, if there is one."""
        if self._queue:
            self._latest = min(self._queue)
            self._send(self._queue.pop(self._latest), now_ns)


class Ensemble(Points):
    """ACT's temporal ensembling (arXiv 2304.13705). The next chunk is requested as soon as one arrives."""

    def __init__(self, robot: Controllers) -> None:
        super().__init__(robot)
        self._chunks: list[tuple[int, np.ndarray]] = []

    def due(self, now_ns: int) -> bool:
        """Returns True: a chunk is always requested."""
        return True

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Stores the chunk."""
        self.counts["chunks"] += 1
        self._chunks.append((observed_ns, positions))

    def tick(self, now_ns: int) -> None:
        """Sends the weighted mean of all chunks at the next control step."""
        period = self._robot.embodiment.period_ns
        at = [(round((now_ns - observed) / period), positions) for observed, positions in self._chunks]
        said = [positions[step] for step, positions in at if step < len(positions)]
        if said:
            weights = np.exp(-0.01 * np.arange(len(said)))
            self._send(weights @ np.array(said) / weights.sum(), now_ns)


class Chunks:
    """Sends complete chunks, at rest at both ends, and requests the next one after the execution."""

    def __init__(self, robot: Controllers) -> None:
        self.counts: Counter[str] = Counter()
        self._robot = robot
        self._end_ns = START_NS

    def due(self, now_ns: int) -> bool:
        """See :class:`Sender`."""
        return now_ns >= self._end_ns

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Sends the chunk."""
        period = self._robot.embodiment.period_ns
        positions = positions[:EXECUTED]
        self._send(positions, now_ns, now_ns, at_rest=[0, -1])
        self._end_ns = now_ns + len(positions) * period

    def tick(self, now_ns: int) -> None:
        """Sends nothing between chunks."""

    def _send(self, positions: np.ndarray, from_ns: int, now_ns: int, at_rest: list[int]) -> None:
        self.counts["chunks"] += 1
        period_s = self._robot.embodiment.period_ns / 1e9
        velocities = np.gradient(positions, period_s, axis=0)
        velocities[at_rest] = 0
        seconds = (from_ns - now_ns) / 1e9 + np.arange(1, len(positions) + 1) * period_s
        for trajectory in split_trajectory(seconds, positions, self._robot.embodiment, velocities):
            self._robot.receive(trajectory, now_ns)


class Unblocked(Chunks):
    """Sends each chunk from its next step on, and requests a chunk every 10 steps."""

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Sends the steps that have not passed."""
        period = self._robot.embodiment.period_ns
        passed = (now_ns - observed_ns) // period
        if passed < len(positions) - 1:
            self._send(positions[passed:], observed_ns + passed * period, now_ns, at_rest=[-1])
        self._end_ns = observed_ns + 10 * period


class Guided(ScheduledSender):
    """Mode ``rtc``, with an expert that is guided by its last chunk with lerobot's linear weights."""

    def __init__(self, robot: Controllers, settings: ScheduleSettings, *, replan_steps: int, latency_s: float) -> None:
        super().__init__(robot, settings, replan_steps=replan_steps, latency_s=latency_s)
        self._period_ns = robot.embodiment.period_ns
        delay = math.ceil((latency_s + settings.send_lead_time_s) * 1e9 / self._period_ns)
        # RTCProcessor.get_prefix_weights, with the policy node's horizon: see clp_ros.policies.rtc.
        self._weights = np.concatenate([np.ones(delay), np.linspace(1, 0, MARGIN_STEPS + 2)[1:-1]])[:, None]
        self._last: tuple[int, np.ndarray] | None = None

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """See :class:`Sender`."""
        if self._last is not None:
            left = self._last[1][round((observed_ns - self._last[0]) / self._period_ns) :]
            count = min(len(left), len(self._weights), len(positions))
            weights = self._weights[:count]
            positions = positions.copy()
            positions[:count] = weights * left[:count] + (1 - weights) * positions[:count]
        super().chunk(positions, observed_ns, now_ns, measured)
        self._last = observed_ns, positions


def scheduled(mode: Mode, replan_steps: int) -> Callable[[Controllers, float], Sender]:
    """clp_ros's chunk schedule."""

    def make(robot: Controllers, latency_s: float) -> Sender:
        kind, settings = Guided if mode == "rtc" else ScheduledSender, ScheduleSettings(mode=mode)
        return kind(robot, settings, replan_steps=replan_steps, latency_s=1.2 * latency_s)

    return make


WAYS: dict[tuple[str, str], Callable[[Controllers, float], Sender]] = {
    ("points", "40 steps"): lambda robot, _: Points(robot),
    ("chunks", "40 steps"): lambda robot, _: Chunks(robot),
    ("async", "25 steps"): lambda robot, _: Async(robot),
    ("act", "at once"): lambda robot, _: Ensemble(robot),
    ("unblocked", "10 steps"): lambda robot, _: Unblocked(robot),
    **{(mode, pace): scheduled(mode, steps) for pace, steps in PACES.items() for mode in MODES},
}


def motion_of(embodiment: Embodiment, seed: int) -> tuple[Motion, np.ndarray]:
    """Returns a motion through random waypoints, and its start."""
    rng = np.random.default_rng(seed)
    lower, upper = (np.array([getattr(joint, side) for joint in embodiment.joints]) for side in ("lower", "upper"))
    reach = np.minimum((upper - lower) / 2, 0.6)
    waypoints = (lower + upper) / 2 + reach * rng.uniform(-1, 1, (4, embodiment.action_size))
    return through(embodiment, waypoints), waypoints[0]


def used(run: Run, limits: Limits) -> float:
    """Returns the largest used share of a limit of position, velocity or acceleration, of any joint at any time."""
    middle, half = (limits.upper + limits.lower) / 2, (limits.upper - limits.lower) / 2
    shares = [
        np.abs(run.positions - middle) / half,
        np.abs(run.velocities) / limits.velocity,
        np.abs(run.accelerations) / limits.acceleration,
    ]
    return float(max(one.max() for one in shares))


def off_path(run: Run, motion: Motion, scale: np.ndarray) -> float:
    """RMS over time and joints of the distance to the moment of the motion that is nearest, within the last 2 s.

    Args:
        run: What was commanded.
        motion: The noise-free expert's.
        scale: (joints,) what counts as one unit of distance: the noise, or 1.
    """
    seconds = (run.times_ns - START_NS) / 1e9
    squares = []
    for at in np.flatnonzero(seconds > _STARTED_S)[::20]:
        moments = np.arange(max(0.0, seconds[at] - 2.0), seconds[at] + 0.3, 2e-3)
        off = ((motion.at(moments) - run.positions[at]) / scale) ** 2
        squares.append(off.mean(axis=1).min())
    return float(np.sqrt(np.mean(squares)))


def run(robot_name: str, seed: int, latency_ms: int, noise: str, way: str, pace: str, lag_ms: int) -> dict[str, float]:
    """Returns one run's figures."""
    embodiment = load_embodiment(robot_name)
    motion, start = motion_of(embodiment, seed)
    robot = Controllers(embodiment, start, interpolate_from_desired_state=not lag_ms, lag_s=lag_ms / 1e3)
    sender = WAYS[way, pace](robot, latency_ms / 1e3)
    rng = np.random.default_rng(seed)
    expert = NoisyExpert(motion, embodiment, noise, seed)
    result = play(
        robot,
        expert,
        sender,
        lambda: round(latency_ms * 1e6 * rng.uniform(0.8, 1.2)),
        STEP_NS,
        4 * motion.seconds,
        tolerance=THERE,
    )
    # The expert is this close to the end before the motion is over.
    moments = np.arange(0.0, motion.seconds, 1e-3)
    away = np.abs(motion.at(moments) - motion.at(np.array([motion.seconds]))).max(axis=1) >= THERE
    expert_s = float(moments[np.flatnonzero(away)[-1]])
    position, velocity = result.jumps()
    noisy = np.where(expert.sigma > 0, expert.sigma, 1e-3)
    return {
        "position_jump": position,
        "velocity_jump": velocity,
        "limits_used": used(result, Limits.of(embodiment)),
        "tracking_rms": result.tracking_rms(),
        "off_path": off_path(result, motion, noisy),
        "refused": sender.counts["late"] + sender.counts["refused"],
        "chunks": sender.counts["chunks"],
        "time": np.inf if result.finished_s is None else result.finished_s / expert_s,
    }


def table(runs: list[dict], worst: bool) -> tuple[Table, list[str]]:
    """Makes a row for each noise, latency, way and pace, over all robots and motions.

    Args:
        runs: What :func:`run` returned, with what it was given.
        worst: Whether to make a row for each noise and way instead, with the worst of its latencies and paces.

    Returns:
        The table, and the rows of clp_ros's modes that miss a goal.
    """
    grouped: dict[tuple, list[dict]] = defaultdict(list)
    for one in runs:
        grouped[one["noise"], one["latency"], one["way"], one["pace"]].append(one)
    missed, rows = [], {}
    order = {key: number for number, key in enumerate(product(NOISES, LATENCIES_MS, WAYS))}
    for key in sorted(grouped, key=lambda key: order[key[0], key[1], key[2:]]):
        its = grouped[key]
        row = {name: max(one[name] for one in its) for name in ("position_jump", "velocity_jump", "limits_used")}
        # Relative to 1 mrad if there is no noise.
        row["path"] = float(np.sqrt(np.mean([one["off_path"] ** 2 for one in its])))
        row["time"] = float(np.mean([one["time"] for one in its]))
        row["refused"] = sum(one["refused"] for one in its)
        row["all"] = row["refused"] + sum(one["chunks"] for one in its)
        rows[key] = row
        good = row["position_jump"] <= GOAL_POSITION and row["velocity_jump"] <= GOAL_VELOCITY
        good &= row["limits_used"] <= 1 + 1e-6 and not row["refused"] and row["path"] < 1
        if key[2] in MODES and not (good and row["time"] <= GOAL_TIME):
            missed.append(" ".join(map(str, key)))
    if worst:
        by_way: dict[tuple, list[dict]] = defaultdict(list)
        for (noise, _, way, _), row in rows.items():
            by_way[noise, "all", way, "all"].append(row)
        rows = {
            key: {name: (sum if name in ("refused", "all") else max)(row[name] for row in its) for name in its[0]}
            for key, its in by_way.items()
        }
    titles = ("noise mrad", "way") if worst else ("noise mrad", "latency ms", "way", "a chunk every")
    made = Table(", ".join(titles), dict(UNITS))
    for key, row in rows.items():
        name = ", ".join(str(part) for part in key if part != "all")
        made.rows[name] = {
            "position jump": float(f"{row['position_jump']:.1e}"),
            "velocity jump": round(row["velocity_jump"], 3),
            "limits used": round(row["limits_used"], 3),
            "off the path / noise": round(row["path"], 2),
            "refused": f"{row['refused']} of {row['all']}",
            "time / expert's": round(row["time"], 3),
        }
    return made, missed


def show(made: Table, missed: list[str]) -> None:
    """Prints a table as Markdown, and the missed goals."""
    heads = [f"{column} {unit or ''}".strip() for column, unit in made.units.items()]
    print(f"| {' | '.join([made.title, *heads])} |\n" + "| --- " * (1 + len(heads)) + "|")
    for name, row in made.rows.items():
        print(f"| {' | '.join([name, *map(str, row.values())])} |")
    print(
        f"\njumps of at most {GOAL_POSITION:g} rad and {GOAL_VELOCITY:g} rad/s, inside the limits, no chunk late or "
        f"refused, nearer to the expert's path than the noise, time / expert's at most {GOAL_TIME:g}: "
        + (f"missed by {'; '.join(missed)}" if missed else "reached by every mode")
    )


def series(file: Path) -> int:
    """Prints how the recorded chunks of a trained policy are followed; returns how many were refused.

    Each run's chunks come in a row, from a robot that is where the last ones led it. They were recorded without limits:
    wrist_3 is asked for more than its velocity limit.

    Args:
        file: An archive with ``run``, ``step``, ``state`` and ``chunk``, of a ur5.
    """
    embodiment = load_embodiment("ur5")
    limits, period = Limits.of(embodiment), embodiment.period_ns
    with np.load(file) as archive:
        runs, steps, states, chunks = (archive[name] for name in ("run", "step", "state", "chunk"))
    print("| mode | latency ms | chunks | refused | limits used | largest distance to the chunk, by joint rad |")
    print("| --- " * 6 + "|")
    refused = 0
    for mode, latency_ms in product(MODES, LATENCIES_MS):
        largest, distances, failed = 0.0, [], 0
        for one in np.unique(runs):
            schedule = ChunkSchedule(limits, period, ScheduleSettings(mode=mode))
            for number in np.flatnonzero(runs == one):
                observed = START_NS + int(steps[number]) * period
                now = observed + latency_ms * 1_000_000
                followed = schedule.reference
                here = states[number] if followed is None else followed.sample(now)[0]
                try:
                    distances.append(schedule.add(chunks[number], observed, now, here).deviation)
                except ClpError:
                    failed += 1
                else:
                    largest = max(largest, excess(schedule.reference, limits).factor)
        joints = " ".join(f"{distance:.2f}" for distance in np.max(distances, axis=0))
        print(f"| {mode} | {latency_ms} | {len(runs)} | {failed} | {largest:.4f} | {joints} |", flush=True)
        refused += failed
    return refused


UNITS = {
    "position jump": "rad",
    "velocity jump": "rad/s",
    "limits used": None,
    "off the path / noise": None,
    "refused": None,
    "time / expert's": None,
}
_KEYS = ("robot", "seed", "latency", "noise", "way", "pace", "lag")


def main() -> int:
    """Runs the requested matrix and prints a Markdown table. Returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--motions", type=int, default=1, help="random motions of each robot (default: %(default)s)")
    parser.add_argument("--robots", nargs="+", choices=ROBOTS, default=ROBOTS, help="(default: all)")
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=NOISES, help="mrad, or bfloat16 (default: all)")
    parser.add_argument("--latency", nargs="+", type=int, choices=LATENCIES_MS, default=LATENCIES_MS, help="ms")
    parser.add_argument("--lag", type=int, default=0, help="lag of the joints in ms, with the controllers' defaults")
    parser.add_argument("--ways", nargs="+", choices=sorted({way for way, _ in WAYS}), help="(default: all)")
    parser.add_argument("--paces", nargs="+", choices=sorted({pace for _, pace in WAYS}), help="(default: all)")
    parser.add_argument("--results", type=Path, help="a file of JSON lines to resume")
    parser.add_argument("--summary", action="store_true", help="run nothing, print what is in --results")
    parser.add_argument("--worst", action="store_true", help="print the worst of all latencies and paces")
    add_output_argument(parser)
    parser.add_argument("--series", type=Path, help="run nothing, follow the recorded chunks of this .npz")
    options = parser.parse_args()
    if options.series is not None:
        return 1 if series(options.series) else 0
    done: dict[tuple, dict] = {}
    if options.results is not None and options.results.exists():
        for line in options.results.read_text().splitlines():
            one = json.loads(line)
            one.setdefault("lag", 0)
            done[tuple(one[key] for key in _KEYS)] = one
    if not options.summary:
        ways = [
            (way, pace)
            for way, pace in WAYS
            if (not options.ways or way in options.ways) and (not options.paces or pace in options.paces)
        ]
        wanted = product(options.noise, options.latency, options.robots, range(options.motions), ways)
        for noise, latency, robot, seed, (way, pace) in wanted:
            key = (robot, seed, latency, noise, way, pace, options.lag)
            if key in done:
                continue
            done[key] = dict(zip(_KEYS, key, strict=True)) | run(*key)
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
    made, missed = table([one for one in done.values() if one["lag"] == options.lag], options.worst)
    show(made, missed)
    reached = f"{len(missed)} rows of clp_ros's modes miss a goal" if missed else "Every mode reaches the goals"
    write_results(options.output, [made], [f"{reached}."], on_machine=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
