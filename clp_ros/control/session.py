# SPDX-License-Identifier: Apache-2.0
"""The state of one activation of the runner."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Session:
    """One activation. A chunk that was begun in one session is never sent in another.

    Times ending in ``_ns`` are on the robot's clock, in nanoseconds.

    Attributes:
        due_ns: Earliest time of the next observation.
        since_ns: Since when the worker has been waiting for an observation.
        seen: By topic, the stamp that each camera's next frame must be newer than; None: any frame.
        last_ns: Time of the watchdog's last check.
        last_s: The same on ``time.monotonic``, in seconds.
        missing: By topic, since when each missing input has been missing.
        jumps: Number of jumps of the robot's clock.
        observed_ns: Observation time of the last chunk that was sent; None before the first and after a safe stop.
        fault: Kind of the present fault; None without a fault.
        fault_reason: Description of the present fault; None without a fault.
        notified: Whether the user was notified of a fault since the last chunk that was sent.
        faults: Number of faults.
    """

    due_ns: int
    since_ns: int
    seen: dict[str, int | None]
    last_ns: int
    last_s: float
    missing: dict[str, int] = field(default_factory=dict)
    jumps: int = 0
    observed_ns: int | None = None
    fault: str | None = None
    fault_reason: str | None = None
    notified: bool = False
    faults: int = 0
