# SPDX-License-Identifier: Apache-2.0
"""A policy's chunks joined by the schedule and followed by simulated controllers, on a clock of its own.

The policy is a scripted expert that answers with the rest of its motion, after a latency. No ROS, no threads: the same
run gives the same numbers, faster than real time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clp_ros.control.chunk_schedule import LateError, ScheduleSettings
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.replan import ReplanConfig
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory
from clp_ros.robots.trajectory_controller import Command, State, TrajectoryController
from clp_ros.simulation.motion import Motion

# The robot's clock when a run begins: a stamp of 0 would mean "now".
START_NS = 10**9
# How far the expert looks for where it is on its way, in seconds.
_LOOK_S = 0.3


class Expert:
    """A policy that knows its motion: it finds how far the robot has come, and answers with what follows.

    Args:
        motion: What it does.
        embodiment: The robot.
        steps: Of a chunk.
    """

    def __init__(self, motion: Motion, embodiment: Embodiment, steps: int) -> None:
        self.motion = motion
        self.progress_s = 0.0
        self._steps = np.arange(1, steps + 1) * embodiment.period_ns / 1e9
        self._range = np.array([joint.upper - joint.lower for joint in embodiment.joints])
        self._seen_ns: int | None = None

    def chunk(self, positions: np.ndarray, now_ns: int) -> np.ndarray:
        """(steps, joints), rad or m: what follows from where the robot was sent last, (joints,)."""
        elapsed = 0.0 if self._seen_ns is None else (now_ns - self._seen_ns) / 1e9
        self._seen_ns = now_ns
        expected = self.progress_s + elapsed
        moments = np.arange(max(0.0, self.progress_s - _LOOK_S), expected + _LOOK_S, 1e-3)
        off = np.abs((self.motion.at(moments) - positions) / self._range).max(axis=1)
        # Where it rests for a while, time alone tells.
        self.progress_s = float(moments[np.argmin(off + 1e-3 * np.abs(moments - expected))])
        return self.motion.at(self.progress_s + self._steps)


class Robot(Protocol):
    """What is driven: controllers, and perhaps a simulated body that follows them."""

    embodiment: Embodiment

    def receive(self, trajectory: Trajectory, now_ns: int) -> None:
        """Gives a trajectory to its controller."""

    def step(self, time_ns: int) -> None:
        """Lets the controllers command the joints, and the joints move, up to a time."""

    def commanded(self) -> State:
        """What all joints were commanded last."""

    def measured(self) -> np.ndarray:
        """(joints,) where they are, rad or m."""


class Controllers:
    """An embodiment's controllers alone, and joints that follow what they are commanded.

    Args:
        embodiment: The robot.
        positions: (joints,) where they are.
        interpolate_from_desired_state: The controllers' parameter of that name, whose own default is false.
        lag_s: Time constant with which the joints follow; 0: they are wherever they are commanded to be.
        noise: Standard deviation of what is measured, rad or m.
        transport_s: Longest time that a message takes to its controller; each takes any time up to it.
        scaling: The robot's speed scaling at a time of the clock, which those of the controllers know that the
            embodiment's ``speed_scaling`` names.
        seed: Of the noise and of the times.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        positions: np.ndarray,
        *,
        interpolate_from_desired_state: bool = True,
        lag_s: float = 0.0,
        noise: float = 0.0,
        transport_s: float = 0.0,
        scaling: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> None:
        self.embodiment = embodiment
        self.controllers: dict[str, TrajectoryController] = {}
        self.from_measured = () if interpolate_from_desired_state else tuple(embodiment.controllers)
        self._lag_s, self._noise, self._transport_s = lag_s, noise, transport_s
        self.scaling = scaling
        self._rng = np.random.default_rng(seed)
        self._on_the_way: list[tuple[int, Trajectory]] = []
        self._joints = np.array(positions, dtype=np.float64)
        self._speeds = np.zeros_like(self._joints)
        self._time_ns: int | None = None
        self._parts: dict[str, slice] = {}
        start = 0
        for name, controller in embodiment.controllers.items():
            joints = [joint.name for joint in controller.joints]
            self._parts[name] = slice(start, start + len(joints))
            self.controllers[name] = TrajectoryController(
                joints,
                positions[self._parts[name]],
                interpolate_from_desired_state=interpolate_from_desired_state,
            )
            start += len(joints)

    def receive(self, trajectory: Trajectory, now_ns: int) -> None:
        """Gives a trajectory to its controller, or sends it on its way."""
        if self._transport_s:
            self._on_the_way.append((now_ns + round(self._rng.uniform(0, self._transport_s) * 1e9), trajectory))
        else:
            self.controllers[trajectory.controller].receive(Command.of(trajectory), now_ns)

    def step(self, time_ns: int) -> None:
        """Commands the joints, and lets them follow."""
        for due_ns, trajectory in self._on_the_way:
            if due_ns <= time_ns:
                self.controllers[trajectory.controller].receive(Command.of(trajectory), time_ns)
        self._on_the_way = [entry for entry in self._on_the_way if entry[0] > time_ns]
        measured = self.measured()
        for name, controller in self.controllers.items():
            if self.scaling is not None and name in self.embodiment.speed_scaling.controllers:
                controller.scaling = self.scaling(time_ns)
            part = self._parts[name]
            controller.sample(time_ns, measured[part], self._speeds[part])
        commanded, passed_s = self.commanded().positions, (time_ns - (self._time_ns or time_ns)) / 1e9
        share = -np.expm1(-passed_s / self._lag_s) if self._lag_s else 1.0
        way = share * (commanded - self._joints)
        self._speeds = way / passed_s if passed_s else np.zeros_like(way)
        self._joints, self._time_ns = self._joints + way, time_ns

    def commanded(self) -> State:
        """What all joints were commanded last."""
        states = [controller.commanded for controller in self.controllers.values()]
        return State(
            *(
                np.concatenate([getattr(one, of) for one in states])
                for of in ("positions", "velocities", "accelerations")
            )
        )

    def measured(self) -> np.ndarray:
        """(joints,) where they are, as it is measured, rad or m."""
        noise = self._rng.normal(scale=self._noise, size=len(self._joints)) if self._noise else 0.0
        return self._joints + noise


class Sender(Protocol):
    """Turns chunks into trajectories."""

    def due(self, now_ns: int) -> bool:
        """Whether the policy is to make a chunk of what it sees now."""

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Takes a chunk, (steps, joints), that was made of what was seen at ``observed_ns``."""

    def tick(self, now_ns: int) -> None:
        """Once a control step."""


class ScheduledSender:
    """clp_ros's own way: what the policy node does with a chunk, at the node's own pace.

    Args:
        robot: Where trajectories go.
        settings: How chunks are joined.
        replan_steps: Control steps from one chunk's observation to the next one's; 0: as soon as it is sent.
        latency_s: What a chunk is expected to take.

    Attributes:
        counts: ``chunks``, ``late``, ``refused``.
        splices: When each chunk took over, on the robot's clock.
    """

    def __init__(self, robot: Robot, settings: ScheduleSettings, *, replan_steps: int, latency_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self.splices: list[int] = []
        self._robot = robot
        self._now_ns = self._due_ns = START_NS
        self._output = TrajectoryOutput(robot.embodiment, settings, self._send, lambda: self._now_ns)
        self._output.start(getattr(robot, "from_measured", ()))
        self._replan, self._mode = ReplanConfig(replan_steps), settings.mode
        self._expected_s = latency_s + settings.send_lead_time_s
        joints = robot.embodiment.joints
        self._offset, self._scale = (np.array([getattr(one, part) for one in joints]) for part in ("offset", "scale"))

    def _send(self, trajectories: list[Trajectory]) -> None:
        for trajectory in trajectories:
            self._robot.receive(trajectory, self._now_ns)

    def due(self, now_ns: int) -> bool:
        """See :class:`Sender`."""
        return now_ns >= self._due_ns and not self._output.is_paused

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """See :class:`Sender`."""
        self._now_ns = now_ns
        period, expected_s = self._robot.embodiment.period_ns, self._expected_s
        splice_ns = observed_ns
        try:
            joined = self._output.chunk(positions, observed_ns, (measured - self._offset) / self._scale)
        except LateError:
            self.counts["late"] += 1
        except ClpError:
            self.counts["refused"] += 1
            self._output.safe_stop()
        else:
            self.counts["chunks"] += 1
            splice_ns = self._output.clock_ns(joined.splice_ns)
            self.splices.append(splice_ns)
        self._due_ns = self._replan.due_ns(self._mode, observed_ns, splice_ns, len(positions), period, expected_s)

    def tick(self, now_ns: int) -> None:
        """See :class:`Sender`."""
        if (scaling := getattr(self._robot, "scaling", None)) is not None:
            self._now_ns = now_ns
            self._output.set_speed_scaling(scaling(now_ns))
            self._output.refresh()


@dataclass(frozen=True)
class Run:
    """What the controllers commanded.

    Attributes:
        times_ns: (samples,) int64.
        positions, velocities, accelerations: (samples, joints) float64, rad or m.
        expert: (samples, joints): the expert's motion in its own time, from the run's beginning on.
        finished_s: When the robot was commanded to where the motion ends, and stayed; None: never.
    """

    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray
    expert: np.ndarray
    finished_s: float | None

    def jumps(self) -> tuple[float, float]:
        """Largest jump in position (rad or m) and in velocity (per s) from one command to the next, of any joint.

        A jump is what the larger velocity (acceleration) of the two samples cannot explain.
        """
        step = np.diff(self.times_ns)[:, None] / 1e9

        def jump(values: np.ndarray, rates: np.ndarray) -> float:
            explained = step * np.maximum(np.abs(rates[1:]), np.abs(rates[:-1]))
            return float((np.abs(np.diff(values, axis=0)) - explained).max(initial=0.0))

        return jump(self.positions, self.velocities), jump(self.velocities, self.accelerations)

    def tracking_rms(self) -> float:
        """Root mean square distance to the expert at the same time, over all joints, rad or m."""
        return float(np.sqrt(np.mean((self.positions - self.expert) ** 2)))


def play(
    robot: Robot,
    expert: Expert,
    sender: Sender,
    latency_ns: Callable[[], int],
    step_ns: int,
    limit_s: float,
    tolerance: float = 0.01,
) -> Run:
    """Runs a policy on a robot until it has come to the motion's end, and rests there for half a second.

    What it sees comes once a control step.

    Args:
        robot: The robot.
        expert: The policy, which sees what was commanded: demonstrations record commands, which lead the joints.
        sender: Turns chunks into trajectories, and has given ``robot.receive`` what to send.
        latency_ns: How long the next chunk takes.
        step_ns: Of the controllers.
        limit_s: Longest run.
        tolerance: How close to the end is there, rad or m.
    """
    end = expert.motion.at(np.array([expert.motion.seconds]))[0]
    times, states, reached = [], [], None
    working: tuple[int, int, np.ndarray] | None = None
    now, tick = START_NS, -1
    while now < START_NS + limit_s * 1e9:
        robot.step(now)
        commanded = robot.commanded()
        times.append(now)
        states.append(commanded)
        is_tick = (now - START_NS) // robot.embodiment.period_ns != tick
        tick = (now - START_NS) // robot.embodiment.period_ns
        if working is None and is_tick and sender.due(now):
            working = (now, now + latency_ns(), expert.chunk(commanded.positions, now))
        if working is not None and now >= working[1]:
            sender.chunk(working[2], working[0], now, robot.measured())
            working = None
        if is_tick:
            sender.tick(now)
        there = np.abs(commanded.positions - end).max() < tolerance and expert.motion.seconds - expert.progress_s < 1.5
        reached = (reached or now) if there else None
        if reached is not None and now > reached + 5e8:
            break
        now += step_ns
    seconds = (np.array(times) - START_NS) / 1e9
    return Run(
        np.array(times),
        *(np.array([getattr(one, of) for one in states]) for of in ("positions", "velocities", "accelerations")),
        expert.motion.at(seconds),
        None if reached is None else (reached - START_NS) / 1e9,
    )
