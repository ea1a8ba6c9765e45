# SPDX-License-Identifier: Apache-2.0
"""An embodiment's joints out of the JointStates of one topic."""

from __future__ import annotations

from typing import Any

import numpy as np

from clp_ros.errors import ClpError
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.stream import Stream

_ORDERS_KEPT = 64


class JointSelector:
    """Picks an embodiment's joints out of the JointStates of one topic, by name, in the policy's units.

    Args:
        embodiment: The robot.
        source: Key in its ``joint_states``.

    Attributes:
        joints: Names of the joints to pick, in vector order.
        indices: Where they belong in ``observation.state``, int.
        names: All names that JointStates had, in the order they came.
    """

    def __init__(self, embodiment: Embodiment, source: str) -> None:
        sources = [c.joint_states for c in embodiment.controllers.values() for _ in c.joints]
        self.indices = np.array([i for i, name in enumerate(sources) if name == source], dtype=int)
        picked = [embodiment.joints[index] for index in self.indices]
        self.joints = tuple(joint.name for joint in picked)
        self._offset = np.array([joint.offset for joint in picked])
        self._scale = np.array([joint.scale for joint in picked])
        self.names: dict[str, None] = {}
        self._orders: dict[tuple[str, ...], tuple[tuple[int, ...], np.ndarray]] = {}

    def select(self, message: Any) -> tuple[tuple[int, ...], np.ndarray]:
        """Positions of the joints that a JointState has.

        Returns:
            Which of :attr:`joints` they are, and their positions, float64, in the policy's units.

        Raises:
            ClpError: It has none of the joints, one twice, or one without a finite position.
        """
        names = tuple(message.name)
        if names not in self._orders:
            if len(self._orders) == _ORDERS_KEPT:
                self._orders.clear()
            self._orders[names] = self._find(names)
        part, order = self._orders[names]
        positions = np.asarray(message.position, dtype=float)
        if len(positions) != len(names):
            raise ClpError(f"a JointState has {len(names)} names but {len(positions)} positions")
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
        if not part:
            raise ClpError(
                f"joint {self.joints[0]!r} is not in the JointState",
                fix=f"it has {', '.join(names) or 'no names'}; name the joints in the embodiment as the robot does",
            )
        return part, np.array([names.index(self.joints[place]) for place in part], dtype=int)


class JointStream:
    """The newest position of every joint of one topic, whose messages may each hold some of the joints only.

    An arm and its gripper often have drivers of their own that publish on one topic.
    """

    def __init__(self, selector: JointSelector) -> None:
        self._selector = selector
        self._parts: dict[tuple[int, ...], Stream] = {}

    def add(self, stamp: int, message: Any, receive_ns: int) -> bool:
        """Takes a JointState, and says whether it did: its stamp must be newer than the last with its joints.

        Raises:
            ClpError: See :meth:`JointSelector.select`.
        """
        part, positions = self._selector.select(message)
        return self._parts.setdefault(part, Stream()).add(stamp, positions, receive_ns)

    def at(self, tick_ns: int) -> tuple[int, np.ndarray] | None:
        """Every joint's newest position at a tick, and the stamp of the oldest of them.

        Returns:
            (stamp, positions), positions (joints,) float64 in the policy's units; None where a joint has none.
        """
        positions = np.full(len(self._selector.joints), np.nan)
        stamps: dict[int, int] = {}
        for stamp, values, part in self._found(tick_ns):
            positions[list(part)] = values
            stamps.update(dict.fromkeys(part, stamp))
        return (min(stamps.values()), positions) if len(stamps) == len(positions) else None

    def lagging(self, tick_ns: int) -> str | None:
        """The joint whose newest position at a tick is older than another's; None where all are as old."""
        stamps = {place: stamp for stamp, _, part in self._found(tick_ns) for place in part}
        if len(set(stamps.values())) < 2:
            return None
        return self._selector.joints[min(stamps, key=stamps.__getitem__)]

    def _found(self, tick_ns: int) -> list[tuple[int, np.ndarray, tuple[int, ...]]]:
        """The entry of every part at a tick, with its joints' places; the oldest first."""
        found = [(*entry, part) for part, stream in self._parts.items() if (entry := stream.at(tick_ns))]
        return sorted(found, key=lambda entry: entry[0])

    def missing(self) -> str | None:
        """A joint that no message had so far, and the names they had; None before the first message that is used."""
        seen = {place for part in self._parts for place in part}
        absent = [name for place, name in enumerate(self._selector.joints) if place not in seen]
        if not seen or not absent:
            return None
        return f"joint {absent[0]!r} is in no JointState (they have {', '.join(self._selector.names)})"
