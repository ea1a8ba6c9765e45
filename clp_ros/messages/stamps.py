# SPDX-License-Identifier: Apache-2.0
"""Keeps the newest messages of one publisher by stamp, and compares its clock with the receiver's."""

from __future__ import annotations

from collections import deque
from typing import Any

from clp_ros.core.errors import ClpError

# A header stamp may lag the receive stamp by this much (network, camera); a larger lag means another clock.
MAX_LAG_NS = 60 * 10**9
# A header stamp may lead by this much, because two hosts' clocks always differ a little.
MAX_LEAD_NS = 10**9
# A larger step of the stamps is a jump of the clock.
MAX_CLOCK_JUMP_NS = 10**9
# Minimum number of messages kept, for a caller whose time is slightly behind the newest receive stamp.
_KEPT = 4
# A single message may be this old, if a publisher latched it long ago. Older stamps come from a clock with another
# zero, such as that of a simulation or the uptime of a computer.
_MAX_AGE_NS = 24 * 3600 * 10**9
# A lag is steady if this many messages, over this time, had the same lag within the jitter. Only a steady lag shows an
# offset of the clock: single messages may be late, and those queued during discovery are late together, each less than
# the one before.
_STEADY_MESSAGES, _STEADY_NS, _JITTER_NS = 3, 500_000_000, 100_000_000


def header_stamp_ns(message: Any) -> int | None:
    """Returns ``header.stamp`` in nanoseconds; None if the message has no header."""
    stamp = getattr(getattr(message, "header", None), "stamp", None)
    return None if stamp is None else stamp.sec * 1_000_000_000 + stamp.nanosec


class Clock:
    """Compares one publisher's stamps with the receive stamps.

    A late message is not an error: the sync policy limits the age. A clock that jumps, or differs from the receiver's,
    is an error.
    """

    def __init__(self) -> None:
        self._newest: int | None = None
        # The shortest lag, since when it holds, how many messages had it, and whether it has held for long enough.
        self._lag: int | None = None
        self._since, self._count, self._confirmed = 0, 0, False

    @property
    def steady_lag_ns(self) -> int | None:
        """The lag of the stamps behind the receive stamps in nanoseconds, if it is steady; otherwise None."""
        return self._lag if self._confirmed and self._count >= _STEADY_MESSAGES else None

    def check(self, stamp: int, receive_ns: int, whose: str = "") -> None:
        """Checks one message's stamps.

        Args:
            stamp: The header stamp, nanoseconds.
            receive_ns: The receive stamp, nanoseconds.
            whose: Names the publisher in errors, if the topic has several.

        Raises:
            ClpError: The clock jumped, or the two stamps come from different clocks.
        """
        lag = receive_ns - stamp
        back = 0 if self._newest is None else self._newest - stamp
        # Delays only lengthen a lag. If a lag is much shorter than all before, the earlier messages were late; but if
        # many had the same lag, or only this stamp is ahead of the receive stamp, the clock jumped.
        ahead = 0
        if self._lag is not None and (
            self.steady_lag_ns is not None or (lag < -MAX_LEAD_NS and abs(self._lag) <= _JITTER_NS)
        ):
            ahead = self._lag - lag
        if max(back, ahead) > MAX_CLOCK_JUMP_NS:
            self._newest = None
            self._restart()
            direction = "backwards" if back > ahead else "forwards"
            raise ClpError(
                f"the clock{whose} jumped {direction} by {max(back, ahead) / 1e9:.1f} s",
                hint="record with one steady clock, or set sync.stamp of the topic to receive",
            )
        if lag >= -MAX_LEAD_NS:
            self._settle(lag, receive_ns)
        # Single old messages, or several received together, may have been queued. If their age stays the same while
        # time passes, they come from another clock.
        steady = self.steady_lag_ns
        if lag < -MAX_LEAD_NS or lag > _MAX_AGE_NS or (steady is not None and steady > MAX_LAG_NS):
            raise ClpError(
                f"header stamps{whose} are {abs(lag) / 1e9:.1f} s {'behind' if lag > 0 else 'ahead of'} the receive "
                "stamps: they are on different clocks",
                hint="set sync.stamp of the topic to receive, or synchronise the clocks of the two hosts",
            )
        self._newest = stamp if self._newest is None else max(stamp, self._newest)

    def _settle(self, lag: int, receive_ns: int) -> None:
        if self._lag is None or lag < self._lag - _JITTER_NS:
            self._lag, self._since, self._count, self._confirmed = lag, receive_ns, 1, False
        elif lag <= self._lag + _JITTER_NS:
            self._lag = min(lag, self._lag)
            self._count += 1
            self._confirmed = self._confirmed or receive_ns - self._since >= _STEADY_NS

    def _restart(self) -> None:
        self._lag = None
        self._since, self._count, self._confirmed = 0, 0, False


class Stream:
    """Keeps one publisher's newest messages: the current one, and those with later stamps."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Any]] = deque()
        self._clock = Clock()

    @property
    def steady_lag_ns(self) -> int | None:
        """See :attr:`Clock.steady_lag_ns`."""
        return self._clock.steady_lag_ns

    @property
    def newest(self) -> int | None:
        """The newest stamp, nanoseconds; None before the first."""
        return self._kept[-1][0] if self._kept else None

    def add(self, stamp: int, value: Any, receive_ns: int, whose: str = "") -> bool:
        """Adds an entry, and returns whether it was accepted: the stamp must be newer than all earlier ones.

        Raises:
            ClpError: See :meth:`Clock.check`. Earlier entries are removed.
        """
        try:
            self._clock.check(stamp, receive_ns, whose)
        except ClpError:
            self._kept.clear()
            raise
        if self._kept and stamp <= self._kept[-1][0]:
            return False
        self._kept.append((stamp, value))
        # Entries are kept by time, not by number: at 500 Hz, four messages are eight milliseconds, and clocks differ by
        # more.
        while len(self._kept) > _KEPT and self._kept[1][0] <= receive_ns:
            self._kept.popleft()
        return True

    def at(self, tick_ns: int) -> tuple[int, Any] | None:
        """Returns the newest (stamp, value) with a stamp at or before a tick; None if there is none."""
        return next((entry for entry in reversed(self._kept) if entry[0] <= tick_ns), None)

    def missing(self, tick_ns: int) -> None:
        """Always None: with one publisher, no message has come yet or all stamps are after the tick."""

    def oldest(self, tick_ns: int) -> tuple[None, int | None]:
        """Returns None, because there is one publisher, and the steady lag of its stamps."""
        return None, self.steady_lag_ns
