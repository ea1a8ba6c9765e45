# SPDX-License-Identifier: Apache-2.0
"""The newest messages of one topic, by their stamps."""

from __future__ import annotations

from collections import deque
from typing import Any

from clp_ros.errors import ClpError

# A header's stamp may lag the receive stamp by this much (a slow network, a camera's own delay); more is another clock.
MAX_LAG_NS = 60 * 10**9
# And it may lead by this much: two hosts' clocks are never quite the same.
MAX_LEAD_NS = 10**9
# A clock that steps by more than this has jumped.
MAX_CLOCK_JUMP_NS = 10**9
# Messages kept at least, for a caller whose own time is slightly behind the newest receive stamp.
_KEPT = 4


class Clock:
    """Watches one topic's stamps against the receive stamps.

    A message that comes late is no fault: the sync policy says how old it may be. A clock that jumps is.
    """

    def __init__(self) -> None:
        self._least_lag: int | None = None
        self._newest: int | None = None

    def check(self, stamp: int, receive_ns: int) -> None:
        """Takes one message's stamps.

        Raises:
            ClpError: The clock jumped, or the two are stamps of different clocks.
        """
        lag = receive_ns - stamp
        back = 0 if self._newest is None else self._newest - stamp
        ahead = 0 if self._least_lag is None else self._least_lag - lag
        if max(back, ahead) > MAX_CLOCK_JUMP_NS:
            direction = "backwards" if back > ahead else "forwards"
            raise ClpError(
                f"the clock jumped {direction} by {max(back, ahead) / 1e9:.1f} s",
                fix="record with one steady clock, or set its sync stamp to receive",
            )
        if not -MAX_LEAD_NS <= lag <= MAX_LAG_NS:
            raise ClpError(
                f"header stamps are {abs(lag) / 1e9:.1f} s {'behind' if lag > 0 else 'ahead of'} the receive stamps: "
                "they are on different clocks",
                fix="set its sync stamp to receive, or use one clock",
            )
        self._least_lag = lag if self._least_lag is None else min(lag, self._least_lag)
        self._newest = stamp if self._newest is None else max(stamp, self._newest)


class Stream:
    """One topic's newest messages: the one that serves now, and those whose time has not come yet."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Any]] = deque()

    def add(self, stamp: int, value: Any, receive_ns: int) -> bool:
        """Takes an entry, and says whether it did: its stamp must be newer than all others'."""
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
