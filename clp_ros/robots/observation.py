# SPDX-License-Identifier: Apache-2.0
"""Makes observations on control ticks from messages of a bag or a live robot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.core.renamed import renamed
from clp_ros.messages.images import decode_image
from clp_ros.messages.joint_states import JointSelector, JointStream, OtherJointsError
from clp_ros.messages.stamps import Stream, header_stamp_ns
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.topics import Sync

# A tick later than any stamp.
_END_OF_TIME = 2**63


class NotReadyError(Exception):
    """There is no observation at this tick.

    Attributes:
        topic: The input that is missing or stale.
        reason: The reason, e.g. ``no message yet`` or ``182 ms old, tolerance 100 ms``.
        kind: The reason without its numbers, for counting.
    """

    def __init__(self, topic: str, reason: str, kind: str) -> None:
        super().__init__(f"{topic}: {reason}")
        self.topic = topic
        self.reason = reason
        self.kind = kind


@dataclass(frozen=True)
class Observation:
    """A policy's inputs at one control tick.

    Attributes:
        tick_ns: The tick, nanoseconds on the clock the messages were received on.
        images: (height, width, 3) uint8 RGB, by the policy's feature.
        state: (action_size,) float32, in the embodiment's joint order and the policy's units.
        stamps: Stamp of the message used, nanoseconds, by topic.
    """

    tick_ns: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    stamps: dict[str, int]


def joint_selector(embodiment: Embodiment, source: str) -> JointSelector:
    """Returns the selector for an embodiment's joints in the JointStates of one of its topics, in the policy's units.

    Args:
        embodiment: The robot.
        source: Key in its ``joint_states``. :meth:`Embodiment.joint_indices` gives the indices of its joints.
    """
    joints = [embodiment.joints[index] for index in embodiment.joint_indices(source)]
    return JointSelector(
        [joint.name for joint in joints], [joint.offset for joint in joints], [joint.scale for joint in joints]
    )


class Source(Protocol):
    """The messages of one topic: a :class:`Stream`, a :class:`JointStream`, or a stream of commands."""

    @property
    def newest(self) -> int | None:
        """The newest stamp, nanoseconds; None before the first."""

    def at(self, tick_ns: int) -> tuple[int, Any] | None:
        """Returns the stamp and value to use at a tick; None if there are none."""

    def missing(self, tick_ns: int) -> tuple[str, str] | None:
        """Returns why there is no value at a tick, with and without numbers; None if no message came or all are
        later."""

    def oldest(self, tick_ns: int) -> tuple[str | None, int | None]:
        """Returns the joint with the oldest stamp at a tick (None: all), and the steady lag of its stamps."""


def select_one(topic: str, source: Source, sync: Sync, tick_ns: int, period_ns: int) -> tuple[int, Any]:
    """Returns the stamp and value of a topic to use at a tick, by the topic's sync policy.

    Args:
        topic: The topic's name, for the error.
        source: The topic's messages.
        sync: How it is sampled.
        tick_ns: Nanoseconds, on the receive clock.
        period_ns: Time between control ticks, nanoseconds.

    Raises:
        NotReadyError: There is no message, or it is too old.
    """
    newest = source.at(tick_ns)
    if newest is None:
        missing = source.missing(tick_ns)
        if missing is not None:
            raise NotReadyError(topic, *missing)
        if source.newest is None:
            raise NotReadyError(topic, "no message yet", "no message yet")
        ahead = (source.newest - tick_ns) / 1e6
        raise NotReadyError(topic, f"its stamps are {ahead:.0f} ms in the future", "stamps in the future")
    age = tick_ns - newest[0]
    if sync.tolerance_ms is not None and age > sync.tolerance_ms * 1e6:
        joint, lag = source.oldest(tick_ns)
        whose = f"joint {joint!r} is " if joint else ""
        reason = f"{whose}{age / 1e6:.0f} ms old, tolerance {sync.tolerance_ms:g} ms"
        if lag is not None and lag > sync.tolerance_ms * 1e6:
            # Even the newest message is always too old on arrival, by a constant time.
            reason += (
                f": its stamps are always {lag / 1e6:.0f} ms behind the receive stamps, as those of a host whose "
                "clock is off (synchronise the clocks, or set sync.stamp of the topic to receive)"
            )
        raise NotReadyError(topic, reason, f"older than {sync.tolerance_ms:g} ms")
    if sync.policy == "drop" and age >= period_ns:
        raise NotReadyError(topic, f"nothing new for {age / 1e6:.0f} ms", "nothing new since the tick before")
    return newest


class ObservationBuffer:
    """Keeps the newest messages of an embodiment's topics, and makes observations from them.

    Not thread-safe: a caller that adds and observes in different threads must hold a lock for both. Images are decoded
    in :meth:`decode` only, so that adding is cheap and decoding needs no lock.

    Args:
        embodiment: The robot.
        keeps_images: Whether the latest image of each camera is kept decoded, for cameras slower than the control rate.
    """

    def __init__(self, embodiment: Embodiment, keeps_images: bool = False) -> None:
        self.embodiment = embodiment
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._others: Counter[tuple[str, str]] = Counter()
        self._has_joints: set[str] = set()
        # Why the latest message was not used, by topic and by the joints that it had; no entry if it was used.
        self._refused: dict[str, dict[tuple[int, ...] | None, str]] = {}
        self._sync: dict[str, Sync] = {topic: embodiment.sync_of(topic) for topic in embodiment.topics}
        self._selectors = {
            states.topic: joint_selector(embodiment, name) for name, states in embodiment.joint_states.items()
        }
        self._indices = {
            states.topic: embodiment.joint_indices(name) for name, states in embodiment.joint_states.items()
        }
        self._features = {camera.topic: camera.feature for camera in embodiment.cameras.values()}
        self._compressed = any("Compressed" in camera.type for camera in embodiment.cameras.values())
        self._decoders = ThreadPoolExecutor(max(1, len(self._features)), thread_name_prefix="decode")
        self._decoding: dict[str, tuple[Any, Future[np.ndarray]]] = {}
        self._decoded: dict[str, tuple[Any, np.ndarray]] = {}  # the latest image of each topic
        self._keeps_images = keeps_images
        self._sources: dict[str, Stream | JointStream] = {}
        self.forget()

    @property
    def dropped(self) -> Counter[tuple[str, str]]:
        """Number of messages not used, by (topic, reason), including those with none of the robot's joints."""
        return self._dropped + self._others

    def faulty(self, topic: str) -> int:
        """Returns the number of a topic's unusable messages. JointStates of other joints are counted only if there are
        no others."""
        counted = self._dropped if topic in self._has_joints else self.dropped
        return sum(count for (name, _), count in counted.items() if name == topic)

    @property
    def refused(self) -> dict[str, str]:
        """Why a topic's latest message was not used, by topic; no entry if it was used.

        If each JointState has some of the joints: why the latest one with some joint was not used.
        """
        return {topic: list(reasons.values())[-1] for topic, reasons in self._refused.items() if reasons}

    def add(self, topic: str, message: Any, receive_ns: int) -> bool:
        """Adds one message, and returns whether it can be used.

        A message that is out of order, or a JointState that cannot be read or has none of the joints, is counted in
        :attr:`dropped` and not used.

        Raises:
            ClpError: The messages have no header stamp, or their clock jumped or differs from that of the receive
                stamps. That publisher's messages are then removed, so that the next message is accepted.
        """
        stamp = header_stamp_ns(message) if self._sync[topic].stamp == "header" else receive_ns
        if stamp is None:
            raise ClpError("messages have no header", where=topic, hint="set sync.stamp of the topic to receive")
        source, part = self._sources[topic], None
        try:
            if isinstance(source, JointStream):
                # Before the clock is checked: a JointState of other joints comes from another clock.
                try:
                    part, positions = source.selector.select(message)
                except OtherJointsError as other:
                    self._others[topic, other.what] += 1
                    if topic not in self._has_joints:
                        self._refuse(topic, None, other.what)
                    return False
                except ClpError as error:
                    return self._drop(topic, error.what)
                self._has_joints.add(topic)
                taken = source.add(stamp, part, positions, receive_ns)
            else:
                taken = source.add(stamp, message, receive_ns)
        except ClpError as error:
            self._refuse(topic, part, error.what)
            raise error.at(topic) from None
        if not taken:
            return self._drop(topic, "out of order", part)
        if reasons := self._refused.get(topic):
            reasons.pop(part, None)
            reasons.pop(None, None)
        return True

    def forget(self, topic: str | None = None) -> None:
        """Removes the messages of one topic, or of all."""
        for name in self._sync if topic is None else (topic,):
            selector = self._selectors.get(name)
            self._sources[name] = Stream() if selector is None else JointStream(selector)
            self._refused.pop(name, None)

    def newest(self, topic: str) -> int | None:
        """Stamp of a topic's newest message, nanoseconds; None before the first.

        If each JointState has some of the joints, this is the stamp of the joint with the oldest position.
        """
        newest = self._sources[topic].at(_END_OF_TIME)
        return None if newest is None else newest[0]

    def lead_ns(self, topic: str, now_ns: int) -> int:
        """Returns by how much a topic's newest stamp, of any joint, is ahead of a time; negative if it is not."""
        newest = self._sources[topic].newest
        return -1 if newest is None else newest - now_ns

    def select(self, tick_ns: int, topics: Sequence[str] | None = None) -> dict[str, tuple[int, Any]]:
        """Returns the (stamp, message) of each topic to use at a tick, by the topic's sync policy.

        Args:
            tick_ns: Nanoseconds, on the receive clock.
            topics: The topics; all by default.

        Raises:
            NotReadyError: A topic has no message to use.
        """
        period = self.embodiment.period_ns
        return {
            topic: select_one(topic, self._sources[topic], self._sync[topic], tick_ns, period)
            for topic in topics or self._sync
        }

    def state(self, tick_ns: int) -> np.ndarray:
        """Returns the state vector at a tick: (action_size,) float32, in the policy's units.

        Raises:
            NotReadyError: A JointState is missing or stale.
        """
        return self._state(self.select(tick_ns, list(self._selectors)))

    def observe(self, tick_ns: int) -> Observation:
        """Returns the observation at a tick, with its images decoded.

        Raises:
            NotReadyError: An input is missing or stale.
            ClpError: An image cannot be decoded.
        """
        return self.decode(tick_ns, self.select(tick_ns))

    def decode(self, tick_ns: int, selected: dict[str, tuple[int, Any]]) -> Observation:
        """Returns the observation from a result of :meth:`select` for all topics."""
        messages = {topic: selected[topic][1] for topic in self._features}
        # All decoders start before the first result is awaited.
        self.decode_ahead(messages)
        pictures = {feature: self._picture(topic, messages[topic]) for topic, feature in self._features.items()}
        return Observation(
            tick_ns=tick_ns,
            images=pictures,
            state=self._state(selected),
            stamps={topic: stamp for topic, (stamp, _) in selected.items()},
        )

    def decode_ahead(self, messages: Mapping[str, Any]) -> None:
        """Starts decoding images, by topic, that :meth:`decode` will probably need, so that it need not wait for them.

        Call it in the thread that calls :meth:`decode`.
        """
        # Compressed images take milliseconds each and are decoded in parallel. For a raw image, the hand-over to a
        # thread would take longer than the conversion.
        for topic, message in messages.items() if self._compressed else ():
            begun, decoded = self._decoding.get(topic), self._decoded.get(topic)
            if (begun is None or begun[0] is not message) and (decoded is None or decoded[0] is not message):
                self._decoding[topic] = message, self._decoders.submit(decode_image, message, topic=topic)

    def _picture(self, topic: str, message: Any) -> np.ndarray:
        """Returns a decoded image that the caller may change."""
        kept = self._decoded.get(topic)
        if kept is not None and kept[0] is message:
            return kept[1].copy()
        picture = self._decoding.pop(topic)[1].result() if self._compressed else decode_image(message, topic=topic)
        if self._keeps_images:
            self._decoded[topic] = message, picture.copy()
        return picture

    def _state(self, selected: dict[str, tuple[int, Any]]) -> np.ndarray:
        state = np.full(self.embodiment.action_size, np.nan)
        for topic in self._selectors:
            state[self._indices[topic]] = selected[topic][1]
        return state.astype(np.float32)

    def _drop(self, topic: str, reason: str, part: tuple[int, ...] | None = None) -> bool:
        self._dropped[topic, reason] += 1
        self._refuse(topic, part, reason)
        return False

    def _refuse(self, topic: str, part: tuple[int, ...] | None, reason: str) -> None:
        reasons = self._refused.setdefault(topic, {})
        reasons.pop(part, None)  # the latest entry is last
        reasons[part] = reason


__getattr__ = renamed(__name__, {"NotReady": "robots.observation:NotReadyError"})
