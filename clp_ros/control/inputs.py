# SPDX-License-Identifier: Apache-2.0
"""A live robot's newest messages, shared by the threads that receive them and the one that acts on them."""

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

from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError, Observation, ObservationBuffer

Selected = dict[str, tuple[int, Any]]

# Stamps that lead the clock by more come from a clock that is set wrongly: what they say of a message's age is false.
MAX_LEAD_NS = 100_000_000
# A camera's period, and how long its frames take to come in, are medians over so many of its latest.
_RECENT = 12


class IncompleteError(Exception):
    """No observation can be made now.

    Attributes:
        missing: Why not, an entry an input; the one whose newest message is the oldest comes first.
    """

    def __init__(self, missing: list[NotReadyError]) -> None:
        super().__init__("; ".join(str(one) for one in missing))
        self.missing = missing


Incomplete = IncompleteError
"""Old name of :class:`IncompleteError`; it goes with the next release."""


@dataclass(frozen=True)
class InputState:
    """How one topic is doing.

    Attributes:
        rate_hz: Messages received a second, since the state was asked for before.
        age_ms: Age of the newest message that can be used; None before the first.
        dropped: Messages that could not be used, in all; JointStates of other joints beside the robot's are none.
        refused: Why the latest one could not; None where it could.
    """

    rate_hz: float
    age_ms: float | None
    dropped: int
    refused: str | None


class LiveInputs:
    """Thread-safe: any thread adds, one takes. Nothing is decoded under the lock, so that adding never waits for it.

    Args:
        embodiment: The robot whose topics they are.
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
        """A number that changes with every camera frame and every :meth:`wake`."""
        return self._version

    def add(self, topic: str, message: Any, now_ns: int) -> None:
        """Takes a message in.

        Raises:
            ClpError: The clock jumped, or the message is stamped by another one. It is not used then.
        """
        with self._changed:
            self._received[topic] += 1
            taken = self._buffer.add(topic, message, now_ns)
            if taken and topic in self._cameras:
                stamp = self._buffer.newest(topic)
                self._recent[topic].append(stamp)
                self._lags[topic].append(max(0, now_ns - stamp))
                self._notify()

    def wait(self, version: int, timeout_s: float) -> None:
        """Waits until :attr:`version` is another one than ``version``, but not longer than ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version, timeout_s)

    def wake(self) -> None:
        """Ends a :meth:`wait` at once."""
        with self._changed:
            self._notify()

    def forget(self) -> None:
        """Forgets all messages, as after a jump of the clock."""
        with self._changed:
            self._buffer.forget()
            for recent in (*self._recent.values(), *self._lags.values()):
                recent.clear()

    def newest_frames(self) -> dict[str, int | None]:
        """Stamp of every camera's newest frame, nanoseconds, by topic; None before the first."""
        with self._changed:
            return {topic: self._buffer.newest(topic) for topic in self._cameras}

    def has_newer(self, seen: Mapping[str, int | None]) -> bool:
        """Whether every camera has a frame newer than its stamp in ``seen``; what :meth:`take` finds out at length."""
        newest = self.newest_frames()
        return all(
            newest[topic] is not None and (stamp is None or newest[topic] > stamp) for topic, stamp in seen.items()
        )

    def take(self, now_ns: int, newer_than: Mapping[str, int | None]) -> Selected:
        """The messages to act on now, not decoded yet.

        Args:
            now_ns: The time.
            newer_than: Stamps by camera topic; each camera's frame must be newer than its own, and not so old that
                the next one is about to come.

        Raises:
            IncompleteError: Inputs are missing or stale, or a camera's newer frame has not come yet.
        """
        selected: Selected = {}
        faults: list[tuple[int, NotReadyError]] = []
        with self._changed:
            for topic in self._topics:
                try:
                    allowed_ns = self._usable_ns(topic)
                    selected[topic] = self._select(topic, now_ns, allowed_ns, newer_than.get(topic))
                except NotReadyError as missing:
                    # Its traceback holds this frame, which holds it: the images would stay until garbage is collected.
                    faults.append((self._buffer.newest(topic) or 0, missing.with_traceback(None)))
        if faults:
            faults.sort(key=lambda fault: fault[0])
            raise IncompleteError([missing for _, missing in faults])
        return selected

    def decode_ahead(self, now_ns: int, newer_than: Mapping[str, int | None]) -> None:
        """Begins to decode the frames that :meth:`take` would give, while those of other cameras are waited for.

        To be called by the thread that decodes.
        """
        messages = {}
        with self._changed:
            for topic in self._cameras:
                with suppress(NotReadyError):
                    entry = self._select(topic, now_ns, self._usable_ns(topic), newer_than.get(topic))
                    messages[topic] = entry[1]
        self._buffer.decode_ahead(messages)

    def missing(self, now_ns: int) -> list[NotReadyError]:
        """Inputs that have no message to act on now, an entry each; a camera's next frame must not be overdue."""
        found = []
        with self._changed:
            for topic in self._topics:
                try:
                    self._select(topic, now_ns, self._period_ns(topic) + self._lag_ns(topic))
                except NotReadyError as missing:
                    found.append(missing.with_traceback(None))
        return found

    def state(self, now_ns: int) -> np.ndarray:
        """Where the joints are, (action_size,) float32 in the policy's units.

        Raises:
            NotReadyError: A JointState is missing or stale.
        """
        with self._changed:
            return self._buffer.state(now_ns)

    def decode(self, now_ns: int, selected: Selected) -> Observation:
        """The observation of what :meth:`take` gave.

        Raises:
            ClpError: An image cannot be decoded.
        """
        # Reads the buffer's settings only, nothing that adding changes: no lock.
        return self._buffer.decode(now_ns, selected)

    def states(self, now_ns: int) -> dict[str, InputState]:
        """How every topic is doing."""
        with self._changed:
            now = time.monotonic()
            seconds = max(now - self._counted_at, 1e-3)
            rates = {topic: (self._received[topic] - self._counted[topic]) / seconds for topic in self._topics}
            self._counted, self._counted_at = Counter(self._received), now
            newest = {topic: self._buffer.newest(topic) for topic in self._topics}
            return {
                topic: InputState(
                    rates[topic],
                    None if newest[topic] is None else (now_ns - newest[topic]) / 1e6,
                    self._buffer.faulty(topic),
                    self._buffer.refused.get(topic),
                )
                for topic in self._topics
            }

    def _select(self, topic: str, now_ns: int, allowed_ns: float, last: int | None = None) -> tuple[int, Any]:
        # Of every publisher: one joint of the future would be that of the past, with a stamp that says it is new.
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
        """Time between a camera's frames; 0 before the second, so that the first is not used."""
        stamps = self._recent.get(topic, ())
        return statistics.median(later - earlier for earlier, later in pairwise(stamps)) if len(stamps) > 1 else 0.0

    def _lag_ns(self, topic: str) -> float:
        """From the stamp of a camera's frame until it has come in."""
        lags = self._lags.get(topic)
        return statistics.median(lags) if lags else 0.0

    def _usable_ns(self, topic: str) -> float:
        """How old a camera's frame may be that is acted on.

        One period: then the next is about to come. It comes later by what frames take to come in, and meanwhile those
        of the other cameras grow old. Only while that is little of a period is there always a moment at which those of
        all are young enough; else, a frame is used until the next one is here.
        """
        period, lag = self._period_ns(topic), self._lag_ns(topic)
        return period if lag * (len(self._cameras) + 1) <= period else period + lag

    def _notify(self) -> None:
        self._version += 1
        self._changed.notify_all()

    @property
    def _topics(self) -> tuple[str, ...]:
        return tuple(self._buffer.embodiment.topics)
