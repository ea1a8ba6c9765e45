# SPDX-License-Identifier: Apache-2.0
"""Closed-loop runs of chunk control on a simulated clock: policy, schedule, controllers.

The policy is a scripted expert that returns the remainder of its motion after a latency. There are no threads and no
ROS, so a run is reproducible and faster than real time.
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

# The robot's clock at the beginning of a run. It is not 0, because a stamp of 0 means "now".
START_NS = 10**9
# The expert searches for its progress within this time around the expected one, in seconds.
_LOOK_S = 0.3


class Expert:
    """A policy with a known motion. It finds the robot's progress in the motion, and returns the following steps.

    Args:
        motion: The motion.
        embodiment: The robot.
        steps: Number of steps of a chunk.
        clock_weight: How much the clock counts against the joints in the estimate of the progress: the share of a
            joint's range that weighs as much as one second.

    Attributes:
        progress_s: The robot's progress in the motion, in seconds.
    """

    def __init__(self, motion: Motion, embodiment: Embodiment, steps: int, clock_weight: float = 1e-3) -> None:
        self.motion = motion
        self._clock_weight = clock_weight
        self.progress_s = 0.0
        self._steps = np.arange(1, steps + 1) * embodiment.period_ns / 1e9
        self._range = np.array([joint.upper - joint.lower for joint in embodiment.joints])
        self._seen_ns: int | None = None

    def chunk(self, positions: np.ndarray, now_ns: int) -> np.ndarray:
        """Returns a chunk, (steps, joints) in rad or m.

        Args:
            positions: (joints,) the last command, rad or m.
            now_ns: The time.
        """
        elapsed = 0.0 if self._seen_ns is None else (now_ns - self._seen_ns) / 1e9
        self._seen_ns = now_ns
        expected = self.progress_s + elapsed
        moments = np.arange(max(0.0, self.progress_s - _LOOK_S), expected + _LOOK_S, 1e-3)
        off = np.abs((self.motion.at(moments) - positions) / self._range).max(axis=1)
        # The distance in time decides where the motion rests.
        self.progress_s = float(moments[np.argmin(off + self._clock_weight * np.abs(moments - expected))])
        return self.motion.at(self.progress_s + self._steps)


class Robot(Protocol):
    """A robot that is driven: its controllers, and possibly a simulated body."""

    embodiment: Embodiment

    def receive(self, trajectory: Trajectory, now_ns: int) -> None:
        """Gives a trajectory to its controller."""

    def step(self, time_ns: int) -> None:
        """Advances the controllers and the joints to a time."""

    def commanded(self) -> State:
        """What all joints were commanded last."""

    def measured(self) -> np.ndarray:
        """Returns the measured positions: (joints,) float64, rad or m."""


class Controllers:
    """An embodiment's controllers, and joints that follow the commands.

    Args:
        embodiment: The robot.
        positions: (joints,) initial positions, rad or m.
        interpolate_from_desired_state: The controllers' parameter of that name. Its default in ros2_control is false.
        lag_s: Time constant with which the joints follow, in seconds; 0: without delay.
        noise: Standard deviation of the measured positions, rad or m.
        transport_s: Longest transport time of a message, in seconds. Each message takes a random time up to it.
        scaling: Returns the robot's speed scaling at a time of the clock. It applies to the controllers that the
            embodiment's ``speed_scaling`` names.
        seed: Seed of the noise and the transport times.
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
        """Gives a trajectory to its controller, after the transport time."""
        if self._transport_s:
            self._on_the_way.append((now_ns + round(self._rng.uniform(0, self._transport_s) * 1e9), trajectory))
        else:
            self.controllers[trajectory.controller].receive(Command.of(trajectory), now_ns)

    def step(self, time_ns: int) -> None:
        """Advances the controllers to a time, and moves the joints."""
        for due_ns, trajectory in self._on_the_way:
            if due_ns <= time_ns:
                self.controllers[trajectory.controller].receive(Command.of(trajectory), time_ns)
        self._on_the_way = [entry for entry in self._on_the_way if entry[0] > time_ns]
        measured, scaled = self.measured(), self.embodiment.speed_scaling
        for name, controller in self.controllers.items():
            if self.scaling is not None and scaled is not None and name in scaled.controllers:
                controller.scaling = self.scaling(time_ns)
            part = self._parts[name]
            controller.sample(time_ns, measured[part], self._speeds[part])
        commanded, passed_s = self.commanded().positions, (time_ns - (self._time_ns or time_ns)) / 1e9
        share = -np.expm1(-passed_s / self._lag_s) if self._lag_s else 1.0
        moved = share * (commanded - self._joints)
        self._speeds = moved / passed_s if passed_s else np.zeros_like(moved)
        self._joints, self._time_ns = self._joints + moved, time_ns

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
        """Returns the measured positions with noise: (joints,) float64, rad or m."""
        noise = self._rng.normal(scale=self._noise, size=len(self._joints)) if self._noise else 0.0
        return self._joints + noise


class Sender(Protocol):
    """Makes trajectories of chunks."""

    def due(self, now_ns: int) -> bool:
        """Returns whether the policy should make a chunk of the present observation."""

    def chunk(self, positions: np.ndarray, observed_ns: int, now_ns: int, measured: np.ndarray) -> None:
        """Accepts a chunk.

        Args:
            positions: (steps, joints), rad or m.
            observed_ns: Time of its observation.
            now_ns: The time.
            measured: (joints,) measured positions, rad or m.
        """

    def tick(self, now_ns: int) -> None:
        """Called once a control step."""


class ScheduledSender:
    """Handles chunks as the policy node does.

    Args:
        robot: The robot.
        settings: How chunks are joined.
        replan_steps: Control steps between the observations of two chunks; 0: as soon as a chunk is sent.
        latency_s: Expected time from an observation to its chunk, in seconds.

    Attributes:
        counts: Counts ``chunks``, ``late`` and ``refused``.
        splices: Time of each splice, on the robot's clock.
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
    """The commands of a run.

    Attributes:
        times_ns: (samples,) int64.
        positions: (samples, joints) float64, rad or m.
        velocities: (samples, joints) float64, per second.
        accelerations: (samples, joints) float64, per second squared.
        expert: (samples, joints) float64: the expert's undisturbed motion, rad or m.
        finished_s: When the command reached the end of the motion and stayed there, in seconds; None: never.
    """

    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray
    expert: np.ndarray
    finished_s: float | None

    def jumps(self) -> tuple[float, float]:
        """Returns the largest jump in position (rad or m) and in velocity (per second) between two commands.

        A jump is the part of a change that exceeds the larger velocity (acceleration) of the two samples times the
        time between them.
        """
        step = np.diff(self.times_ns)[:, None] / 1e9

        def jump(values: np.ndarray, rates: np.ndarray) -> float:
            explained = step * np.maximum(np.abs(rates[1:]), np.abs(rates[:-1]))
            return float((np.abs(np.diff(values, axis=0)) - explained).max(initial=0.0))

        return jump(self.positions, self.velocities), jump(self.velocities, self.accelerations)

    def tracking_rms(self) -> float:
        """Returns the root mean square distance from the expert at the same time, over all joints, rad or m."""
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
    """Runs a policy on a robot until the motion's end has been reached for half a second.

    There is one observation per control step.

    Args:
        robot: The robot.
        expert: The policy. It observes the commands, because demonstrations record commands, which precede the joints.
        sender: Makes trajectories of chunks, and gives them to ``robot.receive``.
        latency_ns: Returns the time of the next chunk, in nanoseconds.
        step_ns: Step of the controllers, in nanoseconds.
        limit_s: Longest run, in seconds.
        tolerance: Distance from the end that counts as reached, rad or m.
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
        np.array([state.positions for state in states]),
        np.array([state.velocities for state in states]),
        np.array([state.accelerations for state in states]),
        expert.motion.at(seconds),
        None if reached is None else (reached - START_NS) / 1e9,
    )
