# SPDX-License-Identifier: Apache-2.0
"""The newest messages of one publisher, by their stamps, and what its clock has to do with the receiver's."""

from __future__ import annotations

from collections import deque
from typing import Any

from clp_ros.core.errors import ClpError

# A header's stamp may lag the receive stamp by this much (a slow network, a camera's own delay); more is another clock.
MAX_LAG_NS = 60 * 10**9
# And it may lead by this much: two hosts' clocks are never quite the same.
MAX_LEAD_NS = 10**9
# A clock that steps by more than this has jumped.
MAX_CLOCK_JUMP_NS = 10**9
# Messages kept at least, for a caller whose own time is slightly behind the newest receive stamp.
_KEPT = 4
# A single message may be this old: what a publisher latched long ago. Older ones have a clock that began elsewhere, as
# a simulation's or one that counts from the start of a computer.
_MAX_AGE_NS = 24 * 3600 * 10**9
# Lags are steady when so many messages, over so long, came with the same lag within the jitter. Only then does a lag
# say something about the clock: a message may always come late, and those that queued while a subscription was
# discovered come late together, each less than the one before.
_STEADY_MESSAGES, _STEADY_NS, _JITTER_NS = 3, 500_000_000, 100_000_000


def header_stamp_ns(message: Any) -> int | None:
    """The message's own time stamp (``header.stamp``) in nanoseconds; None where its type has no header."""
    stamp = getattr(getattr(message, "header", None), "stamp", None)
    return None if stamp is None else stamp.sec * 1_000_000_000 + stamp.nanosec


class Clock:
    """Watches one publisher's stamps against the receive stamps.

    A message that comes late is no fault: the sync policy says how old it may be. A clock that jumps is, and one that
    is not the receiver's.
    """

    def __init__(self) -> None:
        self._newest: int | None = None
        # The shortest lag, since when it has been that, how many messages had it, and whether that was for long enough.
        self._lag: int | None = None
        self._since, self._count, self._confirmed = 0, 0, False

    @property
    def steady_lag_ns(self) -> int | None:
        """By how much stamps are behind the receive stamps, where that has stayed the same for a while; else None."""
        return self._lag if self._confirmed and self._count >= _STEADY_MESSAGES else None

    def check(self, stamp: int, receive_ns: int, whose: str = "") -> None:
        """Takes one message's stamps.

        Args:
            stamp: Its header's.
            receive_ns: When it came in.
            whose: Which of a topic's publishers it is of, for errors.

        Raises:
            ClpError: The clock jumped, or the two are stamps of different clocks.
        """
        lag = receive_ns - stamp
        back = 0 if self._newest is None else self._newest - stamp
        # Delays only ever make a lag longer. One that is much shorter than all before says that those were late, unless
        # many had the same, or the stamp is ahead of the receive stamp where those before were not.
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
                fix="record with one steady clock, or set its sync stamp to receive",
            )
        if lag >= -MAX_LEAD_NS:
            self._settle(lag, receive_ns)
        # One old message, or some that were kept and come together, are old. If time passes, and they stay as old,
        # their clock is another one.
        steady = self.steady_lag_ns
        if lag < -MAX_LEAD_NS or lag > _MAX_AGE_NS or (steady is not None and steady > MAX_LAG_NS):
            raise ClpError(
                f"header stamps{whose} are {abs(lag) / 1e9:.1f} s {'behind' if lag > 0 else 'ahead of'} the receive "
                "stamps: they are on different clocks",
                fix="set its sync stamp to receive, or synchronise the clocks of the two hosts",
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
    """One publisher's newest messages: the one that serves now, and those whose time has not come yet."""

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
        """Takes an entry, and says whether it did: its stamp must be newer than all others'.

        Raises:
            ClpError: See :meth:`Clock.check`. The entries before are forgotten then.
        """
        try:
            self._clock.check(stamp, receive_ns, whose)
        except ClpError:
            self._kept.clear()
            raise
        if self._kept and stamp <= self._kept[-1][0]:
            return False
        self._kept.append((stamp, value))
        # By time and not by number: at 500 Hz, four messages are eight milliseconds, and clocks differ by more.
        while len(self._kept) > _KEPT and self._kept[1][0] <= receive_ns:
            self._kept.popleft()
        return True

    def at(self, tick_ns: int) -> tuple[int, Any] | None:
        """The newest (stamp, value) whose stamp is not after a tick; None where there is none."""
        return next((entry for entry in reversed(self._kept) if entry[0] <= tick_ns), None)

    def missing(self, tick_ns: int) -> None:
        """No reason but that no message has come yet, or that all stamps are after the tick."""

    def oldest(self, tick_ns: int) -> tuple[None, int | None]:
        """Nobody's, for there is one publisher; and the steady lag of its stamps."""
        return None, self.steady_lag_ns
