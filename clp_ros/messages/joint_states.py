# SPDX-License-Identifier: Apache-2.0
"""Reads the positions of a robot's joints from the JointStates of one topic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.renamed import renamed
from clp_ros.messages.stamps import Stream

_ORDERS_KEPT = 64


class OtherJointsError(ClpError):
    """A JointState has none of the selector's joints. It may be that of a mobile base or another arm."""


class JointSelector:
    """Selects joints of JointStates by name, and converts their positions: (position - offset) / scale.

    Args:
        joints: Names of the joints to select, in the order of the result.
        offset: (joints,) float64, rad or m; default 0. The converted position is (position - offset) / scale.
        scale: (joints,) float64, rad or m for each converted unit; default 1.

    Attributes:
        joints: As the argument.
        names: All joint names received, in the order of their arrival.
    """

    def __init__(
        self, joints: Sequence[str], offset: Sequence[float] | None = None, scale: Sequence[float] | None = None
    ) -> None:
        self.joints = tuple(joints)
        self._offset = np.zeros(len(joints)) if offset is None else np.array(offset, dtype=float)
        self._scale = np.ones(len(joints)) if scale is None else np.array(scale, dtype=float)
        self.names: dict[str, None] = {}
        self._orders: dict[tuple[str, ...], tuple[tuple[int, ...], np.ndarray]] = {}

    def select(self, message: Any) -> tuple[tuple[int, ...], np.ndarray]:
        """Returns the positions of those joints that a JointState has.

        Returns:
            Indices into :attr:`joints`, and the converted positions of these joints, float64.

        Raises:
            OtherJointsError: The message has none of the joints.
            ClpError: A joint is in the message twice, or its position is not finite.
        """
        names = tuple(message.name)
        if names not in self._orders:
            if len(self._orders) == _ORDERS_KEPT:
                self._orders.clear()
            self._orders[names] = self._find(names)
        part, order = self._orders[names]
        if not part:
            raise OtherJointsError(
                f"joint {self.joints[0]!r} is not in the JointState, which has {', '.join(names) or 'no names'}",
                hint="name the joints in the embodiment as the robot does",
            )
        positions = np.asarray(message.position, dtype=float)
        if len(positions) != len(names):
            raise ClpError(f"the JointState has {len(names)} names but {len(positions)} positions")
        chosen = positions[order]
        if not np.isfinite(chosen).all():
            joint = self.joints[part[int(np.flatnonzero(~np.isfinite(chosen))[0])]]
            raise ClpError(f"the position of joint {joint!r} is not finite")
        places = list(part)
        return part, (chosen - self._offset[places]) / self._scale[places]

    def _find(self, names: tuple[str, ...]) -> tuple[tuple[int, ...], np.ndarray]:
        self.names |= dict.fromkeys(names)
        twice = next((joint for joint in self.joints if names.count(joint) > 1), None)
        if twice is not None:
            raise ClpError(f"joint {twice!r} is in the JointState twice")
        part = tuple(place for place, joint in enumerate(self.joints) if joint in names)
        return part, np.array([names.index(self.joints[place]) for place in part], dtype=int)


class JointStream:
    """Keeps the newest position of every joint of one topic. Each message may have only some of the joints.

    An arm, its gripper and a mobile base often have separate drivers that publish on one topic. Messages with the same
    joints are treated as those of one publisher, with its own clock.

    Args:
        selector: Selects the joints.

    Attributes:
        selector: As the argument.
    """

    def __init__(self, selector: JointSelector) -> None:
        self.selector = selector
        self._parts: dict[tuple[int, ...], Stream] = {}

    @property
    def newest(self) -> int | None:
        """Stamp of the newest message of any joint, nanoseconds; None before the first."""
        return max((stream.newest for stream in self._parts.values() if stream.newest is not None), default=None)

    def add(self, stamp: int, part: tuple[int, ...], positions: np.ndarray, receive_ns: int) -> bool:
        """Adds the result of :meth:`JointSelector.select`, and returns whether it was accepted.

        The stamp must be newer than that of the last message with these joints.

        Raises:
            ClpError: See :meth:`clp_ros.messages.stamps.Clock.check`. The message names the joint if there are others.
        """
        stream = self._parts.get(part)
        if stream is None:
            stream = self._parts[part] = Stream()
        whose = f" of joint {self.selector.joints[part[0]]!r}" if len(part) < len(self.selector.joints) else ""
        return stream.add(stamp, positions, receive_ns, whose)

    def at(self, tick_ns: int) -> tuple[int, np.ndarray] | None:
        """Returns every joint's newest position at a tick, and the stamp of the oldest of these positions.

        Returns:
            (stamp in ns, (joints,) float64 converted positions); None if a joint has no position yet.
        """
        positions = np.full(len(self.selector.joints), np.nan)
        stamps: dict[int, int] = {}
        for stamp, values, part in self._found(tick_ns):
            positions[list(part)] = values
            stamps.update(dict.fromkeys(part, stamp))
        return (min(stamps.values()), positions) if len(stamps) == len(positions) else None

    def oldest(self, tick_ns: int) -> tuple[str | None, int | None]:
        """Returns the publisher of a tick's oldest position, and the steady lag of its stamps.

        Returns:
            A joint of this publisher, or None if all positions are equally old; and
            :attr:`clp_ros.messages.stamps.Clock.steady_lag_ns`.
        """
        stamps = {place: (stamp, part) for stamp, _, part in self._found(tick_ns) for place in part}
        if not stamps:
            return None, None
        place = min(stamps, key=lambda place: stamps[place][0])
        is_alone = len({stamp for stamp, _ in stamps.values()}) > 1
        return self.selector.joints[place] if is_alone else None, self._parts[stamps[place][1]].steady_lag_ns

    def missing(self, tick_ns: int) -> tuple[str, str] | None:
        """Returns why a tick has the positions of some joints only; None if it has all or none.

        Returns:
            The reason, and the reason without its numbers.
        """
        newest: dict[int, int | None] = {}
        for part, stream in self._parts.items():
            for place in part:
                newest[place] = max(filter(None, (newest.get(place), stream.newest)), default=None)
        present = {place for _, _, part in self._found(tick_ns) for place in part}
        for place, joint in enumerate(self.selector.joints):
            if newest and place not in newest:
                names = ", ".join(self.selector.names)
                return f"joint {joint!r} is in no JointState (they have {names})", "a joint is in no JointState yet"
            if present and place not in present:
                stamp = newest[place]
                if stamp is None:
                    return f"no message yet with joint {joint!r}", "no message yet"
                ahead = (stamp - tick_ns) / 1e6
                return f"the stamps of joint {joint!r} are {ahead:.0f} ms in the future", "stamps in the future"
        return None

    def _found(self, tick_ns: int) -> list[tuple[int, np.ndarray, tuple[int, ...]]]:
        """Returns every publisher's entry at a tick, with the indices of its joints; the oldest first."""
        found = [(*entry, part) for part, stream in self._parts.items() if (entry := stream.at(tick_ns))]
        return sorted(found, key=lambda entry: entry[0])


__getattr__ = renamed(__name__, {"OtherJoints": "messages.joint_states:OtherJointsError"})
