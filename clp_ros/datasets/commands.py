# SPDX-License-Identifier: Apache-2.0
"""Reads actions from the topics that an embodiment declares: the command at each control tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.messages.joint_states import JointSelector, JointStream
from clp_ros.messages.stamps import MAX_LAG_NS, Stream, header_stamp_ns
from clp_ros.robots.actions import ActionTopic, CommandedJoint
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, select_one
from clp_ros.robots.topics import JOINT_STATE_TYPE, JOINT_TRAJECTORY_TYPE
from clp_ros.robots.trajectory_controller import Command, Point, RejectedError, TrajectoryController

State = Callable[[int], np.ndarray]
"""Returns the state vector at a time, in the policy's units. Raises NotReadyError if it is unknown."""


class CommandBuffer:
    """Keeps the newest commands of an embodiment's action topics, and returns the action at a control tick.

    Calls are in the order of time: before a tick, exactly the messages received by then are added.

    Args:
        embodiment: The robot; its source of actions is ``topics``.
        measured: Returns the measured state at a time, where the first trajectory of a controller begins.

    Attributes:
        dropped: Number of messages not used, by (topic, reason).
    """

    def __init__(self, embodiment: Embodiment, measured: State) -> None:
        self.dropped: Counter[tuple[str, str]] = Counter()
        self._embodiment = embodiment
        self._measured = measured
        self._entries = embodiment.actions.topics
        self._joints = {name: embodiment.commanded_joints(name) for name in self._entries}
        self._indices = {name: [joint.index for joint in joints] for name, joints in self._joints.items()}
        self._sources: dict[str, TrajectoryCommands | JointStateCommands | ArrayCommands] = {}
        self.forget()

    def forget(self) -> None:
        """Forgets all messages."""
        for name, entry in self._entries.items():
            joints = self._joints[name]
            if entry.type == JOINT_TRAJECTORY_TYPE:
                self._sources[name] = TrajectoryCommands(entry, joints, self._measured)
            elif entry.type == JOINT_STATE_TYPE:
                self._sources[name] = JointStateCommands(entry, joints)
            else:
                self._sources[name] = ArrayCommands(joints)

    def add(self, topic: str, message: Any, receive_ns: int) -> None:
        """Adds one message. Messages that are unusable, or that a controller refuses, are counted in :attr:`dropped`.

        Raises:
            ClpError: The messages have no header stamp, or their clock jumped or differs from that of the receive
                stamps.
        """
        for name, entry in self._entries.items():
            if entry.topic != topic:
                continue
            try:
                reason = self._sources[name].add(message, receive_ns)
            except ClpError as error:
                raise error.at(topic) from None
            if reason is not None:
                self.dropped[topic, reason] += 1

    def at(self, tick_ns: int) -> tuple[np.ndarray, dict[str, int]]:
        """Returns the action at a tick, and the stamps of the messages that it comes from.

        Returns:
            (action_size,) float32, in the policy's units; and nanoseconds, by topic.

        Raises:
            NotReadyError: A topic has no command.
        """
        action = np.empty(self._embodiment.action_size)
        stamps: dict[str, int] = {}
        for name, entry in self._entries.items():
            commands = self._sources[name]
            stamp, values = select_one(entry.topic, commands.source, entry.sync, tick_ns, self._embodiment.period_ns)
            action[self._indices[name]] = values
            stamp = commands.start_ns if isinstance(commands, TrajectoryCommands) else stamp
            stamps[entry.topic] = min(stamp, stamps.get(entry.topic, stamp))
        return action.astype(np.float32), stamps


class JointStateCommands:
    """The positions of a leader arm. Each of its JointStates may have some of the joints.

    Args:
        entry: The topic.
        joints: Those it commands.

    Attributes:
        source: Their positions, in the policy's units.
    """

    def __init__(self, entry: ActionTopic, joints: Sequence[CommandedJoint]) -> None:
        names, offset, scale = ([getattr(joint, part) for joint in joints] for part in ("name", "offset", "scale"))
        self.source = JointStream(JointSelector(names, offset, scale))
        self._by_header = entry.sync.stamp == "header"

    def add(self, message: Any, receive_ns: int) -> str | None:
        """Adds a JointState, or returns why it cannot be used.

        Raises:
            ClpError: The clock of its stamps jumped, or differs from that of the receive stamps.
        """
        stamp = header_stamp_ns(message) if self._by_header else receive_ns
        if stamp is None:
            raise ClpError("messages have no header", hint="set sync.stamp of the topic to receive")
        try:
            part, positions = self.source.selector.select(message)
        except ClpError as error:
            return error.what
        return None if self.source.add(stamp, part, positions, receive_ns) else "out of order"


class ArrayCommands:
    """Arrays with one position for each joint, as a forward_command_controller expects them.

    Args:
        joints: Those it commands, in the order of the data.

    Attributes:
        source: Their positions, in the policy's units.
    """

    def __init__(self, joints: Sequence[CommandedJoint]) -> None:
        self.source = Stream()
        self._offset = np.array([joint.offset for joint in joints])
        self._scale = np.array([joint.scale for joint in joints])

    def add(self, message: Any, receive_ns: int) -> str | None:
        """Adds an array, or returns why it cannot be used."""
        values = np.array(message.data, dtype=float)
        if values.shape != self._scale.shape:
            return f"a Float64MultiArray has {len(values)} values for {len(self._scale)} joints"
        if not np.isfinite(values).all():
            return "a value is not finite"
        taken = self.source.add(receive_ns, (values - self._offset) / self._scale, receive_ns)
        return None if taken else "out of order"


class TrajectoryCommands:
    """The commands of a joint_trajectory_controller, computed from the trajectories that it was sent.

    A message replaces the previous one when it is received. It begins at its header stamp; or at its receive time, if
    the header stamp is 0 or the topic's stamp is ``receive``. The controller interpolates between points by a line, a
    cubic or a quintic polynomial. Before the first point, it interpolates from its command at the receive time; for the
    first message, from the measured state. After the last point, it stays there.

    Args:
        entry: The topic.
        joints: Those it commands.
        measured: Returns the measured state at a time.

    Attributes:
        source: This object, because commands are computed on demand.
        start_ns: Start of the current trajectory, nanoseconds.
    """

    def __init__(self, entry: ActionTopic, joints: Sequence[CommandedJoint], measured: State) -> None:
        self.source = self
        self.start_ns = 0
        self._by_header = entry.sync.stamp == "header"
        self._names = [joint.name for joint in joints]
        self._indices = [joint.index for joint in joints]
        self._offset = np.array([joint.offset for joint in joints])
        self._scale = np.array([joint.scale for joint in joints])
        self._measured = measured
        self._controller: TrajectoryController | None = None
        self._end_ns: int | None = None

    @property
    def newest(self) -> int | None:
        """End of the current trajectory, nanoseconds; None before the first."""
        return self._end_ns

    def add(self, message: Any, receive_ns: int) -> str | None:
        """Adds a JointTrajectory, or returns why the controller refuses it."""
        stamp = header_stamp_ns(message) if self._by_header else 0
        start_ns = stamp or receive_ns
        if start_ns - receive_ns > MAX_LAG_NS:
            return "it begins more than a minute after it came: its stamp is of another clock"
        if isinstance(command := self._command(message, stamp or 0), str):
            return command
        if self._controller is None:
            self._controller = self._resting(receive_ns)
        try:
            self._controller.sample(receive_ns)
            self._controller.receive(command, receive_ns)
            self._controller.sample(receive_ns)
        except RejectedError as error:
            return f"a joint_trajectory_controller refuses it: {error.what}"
        self.start_ns, self._end_ns = start_ns, start_ns + command.points[-1].time_ns
        return None

    def at(self, tick_ns: int) -> tuple[int, np.ndarray] | None:
        """Returns the command at a tick: (stamp, (joints,) float64 in the policy's units); None if it is unknown.

        The stamp is the tick during the trajectory, and the trajectory's end afterwards.
        """
        if self._controller is None or self._end_ns is None:
            return None
        positions = self._controller.sample(tick_ns)
        if not np.isfinite(positions).all():
            return None
        return min(tick_ns, self._end_ns), (positions - self._offset) / self._scale

    def missing(self, tick_ns: int) -> tuple[str, str] | None:
        """Returns why the command at a tick is unknown, although a trajectory was received."""
        if self._end_ns is None:
            return None
        reason = "its first trajectory has not reached its first point, and the state when it came is not known"
        return reason, "before the first point of its first trajectory"

    def oldest(self, tick_ns: int) -> tuple[None, None]:
        """Returns no joint and no lag: a trajectory's stamp is its start, not the time of sending."""
        return None, None

    def _resting(self, receive_ns: int) -> TrajectoryController:
        try:
            positions = self._offset + self._scale * self._measured(receive_ns)[self._indices].astype(float)
        except NotReadyError:
            positions = np.full(len(self._names), np.nan)
        # The recorded controller's settings are unknown, so nothing that it may have followed is refused.
        return TrajectoryController(
            self._names, positions, allow_partial_joints_goal=True, allow_nonzero_velocity_at_trajectory_end=True
        )

    def _command(self, message: Any, stamp_ns: int) -> Command | str:
        names = list(message.joint_names)
        kept = [place for place, name in enumerate(names) if name in self._names]
        if not kept:
            return f"joint {self._names[0]!r} is not in the trajectory (it has {', '.join(names) or 'no names'})"
        if len(set(names)) < len(names):
            return "a joint is in the trajectory twice"

        def values(given: Any, what: str) -> np.ndarray:
            found = np.asarray(given, dtype=float)
            if len(found) not in ((len(names),) if what == "positions" else (0, len(names))):
                raise ValueError(f"a point has {len(found)} {what} for {len(names)} joints")
            if np.isinf(found).any():
                raise ValueError(f"{what} are not finite")
            return found[kept] if len(found) else found

        try:
            points = tuple(
                Point(
                    point.time_from_start.sec * 10**9 + point.time_from_start.nanosec,
                    values(point.positions, "positions"),
                    values(point.velocities, "velocities"),
                    values(point.accelerations, "accelerations"),
                    point.effort,
                )
                for point in message.points
            )
        except ValueError as error:
            return str(error)
        return Command(tuple(names[place] for place in kept), points, stamp_ns)
