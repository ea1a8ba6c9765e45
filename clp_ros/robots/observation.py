# SPDX-License-Identifier: Apache-2.0
"""Messages in, observations on control ticks out: the same code for a recorded bag and for a live robot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.bags.images import decode_image
from clp_ros.bags.reader import header_stamp_ns
from clp_ros.errors import ClpError
from clp_ros.robots.embodiment import Embodiment, Sync
from clp_ros.robots.joint_states import JointSelector, JointStream
from clp_ros.robots.stream import Clock, Stream

# A tick after all stamps.
_END_OF_TIME = 2**63


class NotReady(Exception):  # noqa: N818 - a state of affairs, not a fault of the user's
    """No observation can be made at this tick.

    Attributes:
        topic: The input that is missing or stale.
        reason: Why, e.g. ``no message yet`` or ``182 ms old, tolerance 100 ms``.
        kind: The reason without its numbers, to count by.
    """

    def __init__(self, topic: str, reason: str, kind: str) -> None:
        super().__init__(f"{topic}: {reason}")
        self.topic = topic
        self.reason = reason
        self.kind = kind


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one control tick.

    Attributes:
        tick_ns: The tick, nanoseconds on the clock the messages were received on.
        images: (height, width, 3) uint8 RGB, by slot.
        state: (action_size,) float32, in the embodiment's joint order and the policy's units.
        stamps: Stamp of the message used, nanoseconds, by topic.
    """

    tick_ns: int
    images: dict[str, np.ndarray]
    state: np.ndarray
    stamps: dict[str, int]


class ObservationBuffer:
    """Holds the newest messages of an embodiment's topics and makes observations of them.

    Not thread-safe: whoever adds from one thread and observes from another holds a lock around both. Images are
    decoded in :meth:`decode` only, so that adding costs next to nothing and decoding can happen outside the lock.

    Attributes:
        dropped: Number of messages not used, by (topic, reason).
        refused: Why a topic's latest message was not used; no entry where it was.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self.embodiment = embodiment
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.refused: dict[str, str] = {}
        self._sync: dict[str, Sync] = {topic: embodiment.sync_of(topic) for topic in embodiment.topics}
        self._selectors = {
            states.topic: JointSelector(embodiment, name) for name, states in embodiment.joint_states.items()
        }
        self._slots = {camera.topic: camera.slot for camera in embodiment.cameras.values()}
        self._compressed = any("Compressed" in camera.type for camera in embodiment.cameras.values())
        self._decoders = ThreadPoolExecutor(max(1, len(self._slots)), thread_name_prefix="decode")
        self._decoding: dict[str, tuple[Any, Future[np.ndarray]]] = {}
        self._sources: dict[str, Stream | JointStream] = {}
        self._clocks: dict[str, Clock] = {}
        self.forget()

    def add(self, topic: str, message: Any, receive_ns: int) -> bool:
        """Takes one message in; returns whether it can be used.

        A message that is out of order, or a JointState that cannot be read or has none of the joints, is counted in
        :attr:`dropped` and not used.

        Raises:
            ClpError: The messages have no header whose stamp could be used, its clock is another one than the receive
                stamps', or it jumped. The topic starts anew then: a robot's next message is taken.
        """
        stamp = header_stamp_ns(message) if self._sync[topic].stamp == "header" else receive_ns
        if stamp is None:
            raise ClpError("messages have no header", where=topic, fix="set its sync stamp to receive")
        try:
            self._clocks[topic].check(stamp, receive_ns)
        except ClpError as error:
            self.forget(topic)
            self.refused[topic] = error.what
            raise ClpError(error.what, where=topic, fix=error.fix) from None
        try:
            taken = self._sources[topic].add(stamp, message, receive_ns)
        except ClpError as error:
            return self._drop(topic, str(error))
        if not taken:
            return self._drop(topic, "out of order")
        self.refused.pop(topic, None)
        return True

    def forget(self, topic: str | None = None) -> None:
        """Forgets the messages of one topic, or of all."""
        for name in self._sync if topic is None else (topic,):
            selector = self._selectors.get(name)
            self._sources[name] = Stream() if selector is None else JointStream(selector)
            self._clocks[name] = Clock()

    def newest(self, topic: str) -> int | None:
        """Stamp of a topic's newest message, nanoseconds; None before the first.

        Where JointStates hold some of the joints each, it is that of the joint whose position is the oldest.
        """
        newest = self._sources[topic].at(_END_OF_TIME)
        return None if newest is None else newest[0]

    def select(self, tick_ns: int, topics: Sequence[str] | None = None) -> dict[str, tuple[int, Any]]:
        """The message of each topic that serves at a tick, by the topic's sync policy: (stamp, message).

        Args:
            tick_ns: Nanoseconds, on the receive clock.
            topics: The topics to look at; all by default.

        Raises:
            NotReady: A topic has none.
        """
        return {topic: self._select_one(topic, tick_ns) for topic in topics or self._sync}

    def state(self, tick_ns: int) -> np.ndarray:
        """The state vector at a tick: (action_size,) float32.

        Raises:
            NotReady: A JointState is missing or stale.
        """
        return self._state(self.select(tick_ns, list(self._selectors)))

    def observe(self, tick_ns: int) -> Observation:
        """The observation at a tick, with its images decoded.

        Raises:
            NotReady: An input is missing or stale.
            ClpError: An image cannot be decoded.
        """
        return self.decode(tick_ns, self.select(tick_ns))

    def decode(self, tick_ns: int, selected: dict[str, tuple[int, Any]]) -> Observation:
        """The observation of what :meth:`select` gave for all topics."""
        messages = {topic: selected[topic][1] for topic in self._slots}
        # All begin before the first is waited for.
        self.decode_ahead(messages)
        pictures = {
            slot: self._decoding.pop(topic)[1].result()
            if self._compressed
            else decode_image(messages[topic], topic=topic)
            for topic, slot in self._slots.items()
        }
        return Observation(
            tick_ns=tick_ns,
            images=pictures,
            state=self._state(selected),
            stamps={topic: stamp for topic, (stamp, _) in selected.items()},
        )

    def decode_ahead(self, messages: Mapping[str, Any]) -> None:
        """Begins to decode images, by topic, that :meth:`decode` is likely to be given: it need not wait for them then.

        To be called by the thread that decodes.
        """
        # Side by side where it takes milliseconds each; handing a raw image over takes longer than converting it.
        for topic, message in messages.items() if self._compressed else ():
            begun = self._decoding.get(topic)
            if begun is None or begun[0] is not message:
                self._decoding[topic] = message, self._decoders.submit(decode_image, message, topic=topic)

    def _state(self, selected: dict[str, tuple[int, Any]]) -> np.ndarray:
        state = np.full(self.embodiment.action_size, np.nan)
        for topic, selector in self._selectors.items():
            state[selector.indices] = selected[topic][1]
        return state.astype(np.float32)

    def _select_one(self, topic: str, tick_ns: int) -> tuple[int, Any]:
        source, sync = self._sources[topic], self._sync[topic]
        newest = source.at(tick_ns)
        if newest is None:
            missing = source.missing() if isinstance(source, JointStream) else None
            if missing is not None:
                raise NotReady(topic, missing, "a joint is in no JointState yet")
            later = self.newest(topic)
            if later is None:
                raise NotReady(topic, "no message yet", "no message yet")
            ahead = (later - tick_ns) / 1e6
            raise NotReady(topic, f"its stamps are {ahead:.0f} ms in the future", "stamps in the future")
        age = tick_ns - newest[0]
        if sync.policy == "asof" and age > sync.tolerance_ms * 1e6:
            joint = source.lagging(tick_ns) if isinstance(source, JointStream) else None
            whose = f"joint {joint!r} is " if joint else ""
            reason = f"{whose}{age / 1e6:.0f} ms old, tolerance {sync.tolerance_ms:g} ms"
            raise NotReady(topic, reason, f"older than {sync.tolerance_ms:g} ms")
        if sync.policy == "drop" and age >= self.embodiment.period_ns:
            raise NotReady(topic, f"nothing new for {age / 1e6:.0f} ms", "nothing new since the tick before")
        return newest

    def _drop(self, topic: str, reason: str) -> bool:
        self.dropped[topic, reason] += 1
        self.refused[topic] = reason
        return False
