# SPDX-License-Identifier: Apache-2.0
"""One activation of a robot's loop: what is due, what has been seen, and what is wrong at present."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Session:
    """One activation. A chunk that was begun in another one is never sent.

    Attributes:
        due_ns: When the next chunk may be made.
        since_ns: Since when the worker has been waiting for its observation.
        seen: Stamps that each camera's frame must be newer than, by topic.
        last_ns, last_s: When the clock was looked at last: the robot's, and the computer's own.
        missing: Since when each input that is missing has been, by topic.
        jumps: How often the robot's clock has jumped.
        observed_ns: Observation time of the chunk sent last; None before the first and after a stop.
        fault: What is wrong at present: the kind; None while all is well.
        holding: The same in words.
        told: Whether a person was told so.
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
    holding: str | None = None
    told: bool = False
    faults: int = 0
