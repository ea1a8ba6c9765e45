# SPDX-License-Identifier: Apache-2.0
"""A model of ROS 2 Jazzy's joint_trajectory_controller: which messages it accepts, and how it interpolates.

It has the topic interface only: no actions, no tolerances. A new message replaces the current trajectory at once, and
begins at the last command (``interpolate_from_desired_state: true``) or at the measured state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.robots.trajectory import Trajectory

# Maximum velocity of a last point at rest; the controller's value, C++'s epsilon of a float.
_AT_REST = float(np.finfo(np.float32).eps)


class RejectedError(ClpError):
    """The controller refuses the message. A real controller only logs this."""


@dataclass(frozen=True)
class Point:
    """A point of a trajectory message, with fields of any length.

    Attributes:
        time_ns: ``time_from_start``.
        positions: rad or m, one for each joint; velocities and accelerations likewise, or empty.
        velocities: per second.
        accelerations: per second squared.
        effort: Position controllers refuse effort.
    """

    time_ns: int
    positions: Sequence[float] | np.ndarray
    velocities: Sequence[float] | np.ndarray = ()
    accelerations: Sequence[float] | np.ndarray = ()
    effort: Sequence[float] | np.ndarray = ()


@dataclass(frozen=True)
class Command:
    """A trajectory message.

    Attributes:
        joint_names: In any order.
        points: In time order.
        stamp_ns: Its start, nanoseconds; 0: on receipt.
    """

    joint_names: tuple[str, ...]
    points: tuple[Point, ...]
    stamp_ns: int = 0

    @classmethod
    def of(cls, trajectory: Trajectory) -> Command:
        """Returns the message for a trajectory."""
        speeds = trajectory.velocities
        points = tuple(
            Point(round(seconds * 1e9), position, () if speeds is None else speeds[index])
            for index, (seconds, position) in enumerate(zip(trajectory.times, trajectory.positions, strict=True))
        )
        return cls(trajectory.joint_names, points, trajectory.start_ns)


@dataclass(frozen=True)
class State:
    """A state of joints, measured or commanded: each (joints,) float64; rad or m, per second, per second squared."""

    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray

    @classmethod
    def resting(cls, positions: Sequence[float] | np.ndarray) -> State:
        """Returns the state at rest at these positions."""
        positions = np.array(positions, dtype=np.float64)
        return cls(positions, np.zeros_like(positions), np.zeros_like(positions))


class TrajectoryController:
    """One controller. Times must not decrease.

    Args:
        joints: The joints' names, in the controller's order.
        positions: The joints' initial positions, rad or m.
        allow_partial_joints_goal: Accept messages that name some of the joints; the others stay.
        allow_nonzero_velocity_at_trajectory_end: Accept messages that do not end at rest.
        interpolate_from_desired_state: Begin a new trajectory at the last command, not at the measured state.

    Attributes:
        commanded: The last commanded state.
        scaling: Speed of following a trajectory, relative to the clock. The start of a new one is not scaled.
    """

    def __init__(
        self,
        joints: Sequence[str],
        positions: Sequence[float] | np.ndarray,
        *,
        allow_partial_joints_goal: bool = False,
        allow_nonzero_velocity_at_trajectory_end: bool = False,
        interpolate_from_desired_state: bool = True,
    ) -> None:
        self.joints = tuple(joints)
        self.commanded = State.resting(positions)
        self._partial = allow_partial_joints_goal
        self._moving_end = allow_nonzero_velocity_at_trajectory_end
        self._from_desired = interpolate_from_desired_state
        self.scaling = 1.0
        self._commanded_ns: int | None = None
        self._trajectory_ns = 0
        self._following: _Following | None = None
        self._next: Command | None = None

    @property
    def parameters(self) -> dict[str, str | bool | list[str]]:
        """Returns the ROS parameters of a joint_trajectory_controller with the same behaviour."""
        return {
            "joints": list(self.joints),
            "allow_partial_joints_goal": self._partial,
            "allow_nonzero_velocity_at_trajectory_end": self._moving_end,
            "interpolate_from_desired_state": self._from_desired,
            "interpolation_method": "splines",
        }

    def receive(self, command: Command, now_ns: int) -> None:
        """Accepts a message, which is followed from the next :meth:`sample` on.

        Raises:
            RejectedError: The message is refused. The current trajectory continues.
        """
        self._check(command, now_ns)
        self._next = command

    def sample(
        self,
        time_ns: int,
        measured: Sequence[float] | np.ndarray | None = None,
        speeds: Sequence[float] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the commanded positions, as the controller's update: (joints,) float64, rad or m.

        Args:
            time_ns: The time.
            measured: (joints,), the measured positions; needed only without ``interpolate_from_desired_state``.
            speeds: (joints,), the measured velocities, if the hardware has velocity state interfaces.
        """
        if self._next is not None:
            before_ns, before = self._commanded_ns, self.commanded
            if not self._from_desired:
                if measured is None:
                    raise ValueError("this controller begins from where the joints are: give measured")
                before_ns, before = time_ns, State.resting(measured)
                if speeds is not None:
                    before = State(before.positions, np.array(speeds, dtype=np.float64), before.accelerations)
            before_ns = time_ns if before_ns is None else before_ns
            self._following = _Following(self._in_order(self._next), self._next.stamp_ns or time_ns, before_ns, before)
            self._next = None
            self._trajectory_ns = time_ns
        elif self._commanded_ns is not None:
            self._trajectory_ns += round(self.scaling * (time_ns - self._commanded_ns))
        if self._following is not None:
            wanted = self._following.state(self._trajectory_ns)
            # NaN is not written to the hardware: that joint stays.
            put = np.isnan(wanted.positions)
            self.commanded = State(
                np.where(put, self.commanded.positions, wanted.positions),
                np.where(put | np.isnan(wanted.velocities), 0.0, wanted.velocities),
                np.where(put | np.isnan(wanted.accelerations), 0.0, wanted.accelerations),
            )
        self._commanded_ns = time_ns
        return self.commanded.positions

    def _check(self, command: Command, now_ns: int) -> None:
        names, count = command.joint_names, len(self.joints)
        if not names:
            raise RejectedError("the trajectory names no joints")
        if len(names) > count or (len(names) < count and not self._partial):
            raise RejectedError(f"the trajectory names {len(names)} joints, the controller has {count}")
        for name in names:
            if name not in self.joints:
                raise RejectedError(f"the controller has no joint {name!r}")
        if not command.points:
            raise RejectedError("the trajectory has no points")
        last = command.points[-1]
        if command.stamp_ns and command.stamp_ns + last.time_ns < now_ns:
            raise RejectedError(f"the trajectory ended {(now_ns - command.stamp_ns - last.time_ns) / 1e9:.3f} s ago")
        if not self._moving_end and any(abs(speed) > _AT_REST for speed in last.velocities):
            raise RejectedError("the trajectory does not end at rest")
        previous_ns: float = -math.inf
        for index, point in enumerate(command.points):
            if point.time_ns <= previous_ns:
                raise RejectedError(f"point {index} is not after the one before it")
            previous_ns = point.time_ns
            if len(point.positions) != len(names):
                raise RejectedError(f"point {index} has {len(point.positions)} positions for {len(names)} joints")
            for what in ("velocities", "accelerations"):
                if len(getattr(point, what)) not in (0, len(names)):
                    raise RejectedError(f"point {index} has {len(getattr(point, what))} {what} for {len(names)} joints")
            if len(point.effort):
                raise RejectedError(f"point {index} has effort")

    def _in_order(self, command: Command) -> list[_Knot]:
        """Returns its points in the controller's order of joints. Joints that are not named stay."""
        at = [self.joints.index(name) for name in command.joint_names]
        partial = len(at) < len(self.joints)

        def sorted_to(values: Sequence[float] | np.ndarray, stay: np.ndarray) -> np.ndarray:
            # A joint left out because of duplicate names goes to 0, as in the controller.
            found = stay.copy() if partial else np.zeros(len(self.joints))
            found[at] = values
            return found

        still = np.zeros(len(self.joints))
        return [
            _Knot(
                point.time_ns,
                sorted_to(point.positions, self.commanded.positions),
                sorted_to(point.velocities, still) if len(point.velocities) else None,
                sorted_to(point.accelerations, still) if len(point.accelerations) else None,
            )
            for point in command.points
        ]


@dataclass(frozen=True)
class _Knot:
    """A point in the controller's order of joints: each (joints,) float64, or None if the message has none."""

    time_ns: int
    positions: np.ndarray
    velocities: np.ndarray | None
    accelerations: np.ndarray | None


class _Following:
    """The current trajectory: its points, its start, and the state before it."""

    def __init__(self, points: list[_Knot], start_ns: int, before_ns: int, before: State) -> None:
        self._points = points
        self._times_ns = [start_ns + point.time_ns for point in points]
        self._before = _Knot(before_ns, before.positions, before.velocities, before.accelerations)

    def state(self, time_ns: int) -> State:
        following = bisect_right(self._times_ns, time_ns)
        if following == len(self._points):  # after the end, it stays at the last point
            last, still = self._points[-1], np.zeros_like(self._points[-1].positions)
            speeds, forces = (still if values is None else values for values in (last.velocities, last.accelerations))
            return State(last.positions, speeds, forces)
        end, end_ns = self._points[following], self._times_ns[following]
        if following == 0:
            return _between(self._before, self._before.time_ns, end, end_ns, time_ns)
        return _between(self._points[following - 1], self._times_ns[following - 1], end, end_ns, time_ns)


def _between(start: _Knot, start_ns: int, end: _Knot, end_ns: int, time_ns: int) -> State:
    """Interpolates between two points by a line, a cubic or a quintic polynomial, depending on their common
    derivatives."""
    span, at = (end_ns - start_ns) / 1e9, (time_ns - start_ns) / 1e9
    p0, p1, v0, v1 = start.positions, end.positions, start.velocities, end.velocities
    a0, a1 = start.accelerations, end.accelerations
    way = p1 - p0
    if v0 is None or v1 is None:
        coefficients = [p0, way / span]
    elif a0 is None or a1 is None:
        coefficients = [p0, v0, (3 * way / span - 2 * v0 - v1) / span, (v0 + v1 - 2 * way / span) / span**2]
    else:
        coefficients = [
            p0,
            v0,
            a0 / 2,
            (20 * way - (8 * v1 + 12 * v0) * span - (3 * a0 - a1) * span**2) / (2 * span**3),
            (-30 * way + (14 * v1 + 16 * v0) * span + (3 * a0 - 2 * a1) * span**2) / (2 * span**4),
            (12 * way - 6 * (v1 + v0) * span + (a1 - a0) * span**2) / (2 * span**5),
        ]
    powers = range(len(coefficients))
    derivatives = [
        [at**power for power in powers],
        [power * at ** max(0, power - 1) for power in powers],
        [power * (power - 1) * at ** max(0, power - 2) for power in powers],
    ]
    return State(*(np.array(derivatives) @ np.array(coefficients)))
