# SPDX-License-Identifier: Apache-2.0
"""The newest messages of a live robot, shared by the threads that receive them and the worker that uses them."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from clp_ros.core.renamed import renamed
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, Observation, ObservationBuffer

# By topic: the stamp in nanoseconds, and the message.
Selected = dict[str, tuple[int, Any]]

# A stamp farther in the future comes from a clock that is set wrongly, so the age of the message is unknown.
MAX_LEAD_NS = 100_000_000
# Number of latest frames from which a camera's period and the delay of its frames are estimated, as medians.
_RECENT = 12


class IncompleteError(Exception):
    """No observation can be made now.

    Attributes:
        missing: The reason for each missing input. The input with the oldest newest message comes first.
    """

    def __init__(self, missing: list[NotReadyError]) -> None:
        super().__init__("; ".join(str(one) for one in missing))
        self.missing = missing


@dataclass(frozen=True)
class InputState:
    """The state of one topic.

    Attributes:
        rate_hz: Messages received per second, since the last query of the states.
        age_ms: Age of the newest usable message, in milliseconds; None before the first.
        dropped: Total number of unusable messages. JointStates of other joints are not counted.
        refused: Why the latest message was unusable; None if it was usable.
    """

    rate_hz: float
    age_ms: float | None
    dropped: int
    refused: str | None


class LiveInputs:
    """The newest messages of a robot's topics.

    Thread-safe: any thread may add messages, and one thread takes them. Images are decoded without the lock, so adding
    never waits for decoding.

    Args:
        embodiment: The robot.
    """

    def __init__(self, embodiment: Embodiment) -> None:
        self._buffer = ObservationBuffer(embodiment)
        self._cameras = tuple(camera.topic for camera in embodiment.cameras.values())
        self._changed = threading.Condition()
        self._recent: dict[str, deque[int]] = {topic: deque(maxlen=_RECENT) for topic in self._cameras}
        self._lags: dict[str, deque[int]] = {topic: deque(maxlen=_RECENT) for topic in self._cameras}
        self._received: Counter[str] = Counter()
        self._counted, self._counted_at = Counter(self._received), time.monotonic()
        self._version = 0

    @property
    def version(self) -> int:
        """A number that changes with every camera frame and with every :meth:`wake`."""
        return self._version

    def add(self, topic: str, message: Any, now_ns: int) -> None:
        """Adds a message.

        Args:
            topic: Its topic.
            message: The message.
            now_ns: The time.

        Raises:
            ClpError: The clock jumped, or the message was stamped by another clock. The message is dropped.
        """
        with self._changed:
            self._received[topic] += 1
            taken = self._buffer.add(topic, message, now_ns)
            if taken and topic in self._cameras:
                if (stamp := self._buffer.newest(topic)) is not None:
                    self._recent[topic].append(stamp)
                    self._lags[topic].append(max(0, now_ns - stamp))
                self._notify()

    def wait(self, version: int, timeout_s: float) -> None:
        """Waits until :attr:`version` differs from ``version``, at most for ``timeout_s`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)

    def wake(self) -> None:
        """Ends every :meth:`wait` at once."""
        with self._changed:
            self._notify()

    def forget(self) -> None:
        """Removes all messages, as after a jump of the clock."""
        with self._changed:
            self._buffer.forget()
            for recent in (*self._recent.values(), *self._lags.values()):
                recent.clear()

    def newest_frames(self) -> dict[str, int | None]:
        """Returns the stamp of every camera's newest frame by topic, in nanoseconds; None before the first."""
        with self._changed:
            return {topic: self._buffer.newest(topic) for topic in self._cameras}

    def has_newer(self, seen: Mapping[str, int | None]) -> bool:
        """Returns whether every camera has a frame newer than its stamp in ``seen``. Cheaper than :meth:`take`."""
        newest = self.newest_frames()
        return all(
            (latest := newest[topic]) is not None and (stamp is None or latest > stamp) for topic, stamp in seen.items()
        )

    def take(self, now_ns: int, newer_than: Mapping[str, int | None]) -> Selected:
        """Returns the messages for an observation now, not decoded.

        Args:
            now_ns: The time.
            newer_than: Stamps by camera topic. Each camera's frame must be newer than its stamp, and recent enough that
                the next frame is not due yet.

        Raises:
            IncompleteError: Inputs are missing or stale, or a camera has no newer frame.
        """
        selected: Selected = {}
        faults: list[tuple[int, NotReadyError]] = []
        with self._changed:
            for topic in self._topics:
                try:
                    allowed_ns = self._usable_ns(topic)
                    selected[topic] = self._select(topic, now_ns, allowed_ns, newer_than.get(topic))
                except NotReadyError as missing:
                    # The traceback is removed: its reference cycle would keep the images until a garbage collection.
                    faults.append((self._buffer.newest(topic) or 0, missing.with_traceback(None)))
        if faults:
            faults.sort(key=lambda fault: fault[0])
            raise IncompleteError([missing for _, missing in faults])
        return selected

    def decode_ahead(self, now_ns: int, newer_than: Mapping[str, int | None]) -> None:
        """Decodes the frames that :meth:`take` would return, while frames of other cameras are missing.

        Only the thread that decodes may call this.

        Args:
            now_ns: The time.
            newer_than: As for :meth:`take`.
        """
        messages = {}
        with self._changed:
            for topic in self._cameras:
                with suppress(NotReadyError):
                    entry = self._select(topic, now_ns, self._usable_ns(topic), newer_than.get(topic))
                    messages[topic] = entry[1]
        self._buffer.decode_ahead(messages)

    def missing(self, now_ns: int) -> list[NotReadyError]:
        """Returns the inputs without a usable message. A camera is missing if its next frame is overdue."""
        found = []
        with self._changed:
            for topic in self._topics:
                try:
                    self._select(topic, now_ns, self._period_ns(topic) + self._lag_ns(topic))
                except NotReadyError as missing:
                    found.append(missing.with_traceback(None))
        return found

    def state(self, now_ns: int) -> np.ndarray:
        """Returns the measured positions: (action_size,) float32, in the policy's units.

        Raises:
            NotReadyError: A JointState is missing or stale.
        """
        with self._changed:
            return self._buffer.state(now_ns)

    def decode(self, now_ns: int, selected: Selected) -> Observation:
        """Decodes the messages that :meth:`take` returned.

        Raises:
            ClpError: An image cannot be decoded.
        """
        # No lock: this reads only the buffer's settings, which adding does not change.
        return self._buffer.decode(now_ns, selected)

    def states(self, now_ns: int) -> dict[str, InputState]:
        """Returns the state of every topic."""
        with self._changed:
            now = time.monotonic()
            seconds = max(now - self._counted_at, 1e-3)
            rates = {topic: (self._received[topic] - self._counted[topic]) / seconds for topic in self._topics}
            self._counted, self._counted_at = Counter(self._received), now
            newest = {topic: self._buffer.newest(topic) for topic in self._topics}
            return {
                topic: InputState(
                    rates[topic],
                    None if stamp is None else (now_ns - stamp) / 1e6,
                    self._buffer.faulty(topic),
                    self._buffer.refused.get(topic),
                )
                for topic, stamp in newest.items()
            }

    def _select(self, topic: str, now_ns: int, allowed_ns: float, last: int | None = None) -> tuple[int, Any]:
        """Returns a topic's message for now.

        Args:
            topic: The topic.
            now_ns: The time.
            allowed_ns: Largest age of a camera's frame.
            last: A camera's frame must be newer than this stamp; None: any frame.

        Raises:
            NotReadyError: There is no usable message.
        """
        # A stamp in the future would make an old message look new, so the newest stamp of each publisher is checked.
        if (ahead := self._buffer.lead_ns(topic, now_ns)) > MAX_LEAD_NS:
            raise NotReadyError(
                topic,
                f"its stamps are {ahead / 1e6:.0f} ms in the future (synchronise the clocks of the two hosts)",
                "stamps in the future",
            )
        try:
            entry = self._buffer.select(now_ns, [topic])[topic]
        except NotReadyError as missing:
            why = self._buffer.refused.get(topic)
            raise NotReadyError(topic, f"{missing.reason}; {why}" if why else missing.reason, missing.kind) from None
        age = now_ns - entry[0]
        if topic in self._cameras and ((last is not None and entry[0] <= last) or age > allowed_ns):
            raise NotReadyError(topic, f"no newer frame for {age / 1e6:.0f} ms", "no newer frame")
        return entry

    def _period_ns(self, topic: str) -> float:
        """Returns the median time between a camera's frames; 0 before the second, so that the first is not used."""
        stamps = self._recent.get(topic, ())
        return statistics.median(later - earlier for earlier, later in pairwise(stamps)) if len(stamps) > 1 else 0.0

    def _lag_ns(self, topic: str) -> float:
        """Returns the median time from the stamp of a camera's frame until the frame is received."""
        lags = self._lags.get(topic)
        return statistics.median(lags) if lags else 0.0

    def _usable_ns(self, topic: str) -> float:
        """Returns the largest age at which a camera's frame is used.

        Usually this is one period, because then the next frame is due. But the next frame arrives later by the delay of
        its transport, while the frames of the other cameras age. If the delay is a large part of the period, there may
        be no moment at which all frames are recent enough. Then a frame is used until the next one arrives.
        """
        period, lag = self._period_ns(topic), self._lag_ns(topic)
        return period if lag * (len(self._cameras) + 1) <= period else period + lag

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    @property
    def _topics(self) -> tuple[str, ...]:
        return tuple(self._buffer.embodiment.topics)


__getattr__ = renamed(__name__, {"Incomplete": "control.inputs:IncompleteError"})
