# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a robot that is driven, whether a chunk is being made or not: inputs, clock, state, policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from clp_ros.control.inputs import LiveInputs
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.pace import Watch
from clp_ros.control.safety import OutsideError
from clp_ros.control.session import Session
from clp_ros.robots.observation import NotReadyError

OUTSIDE = "outside"
PAUSED = "paused"
# A robot that is paused for longer does not go on with an old chunk.
_PAUSE_S = 0.5
# A clock that runs ahead of the computer's own by more than this from one look to the next has jumped.
JUMP_NS = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        kind: Which fault it is: while it stays the same, it is one fault that lasts.
        why: In words.
    """

    kind: str
    why: str


class Guard:
    """Not thread-safe: whoever looks holds the lock of the session. It computes and sends nothing.

    Args:
        inputs: The robot's messages.
        output: What it follows.
        watch: How long anything may last.
        clock_ns: The time on the messages' clock, nanoseconds. May jump.
    """

    def __init__(self, inputs: LiveInputs, output: TrajectoryOutput, watch: Watch, clock_ns: Callable[[], int]) -> None:
        self._inputs = inputs
        self._output = output
        self._watch = watch
        self._clock_ns = clock_ns
        # When the speed scaling came in last, and since when it has been 0, on time.monotonic.
        self.scaling_s: float | None = None
        self._paused_s: float | None = None

    def look(self, session: Session, working_s: float | None) -> Finding | None:
        """What is wrong now; None where all is well.

        Args:
            session: The activation.
            working_s: Since when the policy has been at work, on ``time.monotonic``; None while it is not.
        """
        if (jumped := self.clock(session)) is not None:
            return jumped
        now, now_s = session.last_ns, session.last_s
        if working_s is not None and now_s - working_s > self._watch.policy_timeout_s:
            return Finding("policy hangs", f"the policy has been at work for {now_s - working_s:.1f} s")
        missing = self._inputs.missing(now)
        session.missing = {one.topic: session.missing.get(one.topic, now) for one in missing}
        for one in missing:
            if now - session.missing[one.topic] > self._watch.input_timeout_s * 1e9:
                return Finding(f"{one.topic} {one.kind}", str(one))
        if self.scaling_s is not None and now_s - self.scaling_s > self._watch.input_timeout_s:
            return Finding("speed scaling", f"no speed scaling for {now_s - self.scaling_s:.1f} s")
        self._paused_s = (self._paused_s or now_s) if self._output.is_paused else None
        if self._paused_s is not None and now_s - self._paused_s > _PAUSE_S:
            return Finding(PAUSED, "the robot is paused, or in a protective stop: its speed scaling is 0")
        try:
            self._output.check_state(self._inputs.state(now))
        except OutsideError as outside:
            return Finding(OUTSIDE, str(outside))
        except NotReadyError:
            pass  # one of those that are missing, for a moment only as yet
        return None

    def clock(self, session: Session) -> Finding | None:
        """Whether the clock has jumped since the last look: all that was stamped before says nothing any more then."""
        now, now_s = self._clock_ns(), time.monotonic()
        passed = now - session.last_ns
        jumped = passed - round((now_s - session.last_s) * 1e9)
        session.last_ns, session.last_s = now, now_s
        if passed >= 0 and jumped <= JUMP_NS:
            return None
        self._inputs.forget()
        self._output.note_jump(jumped)
        session.jumps += 1
        session.due_ns = session.since_ns = now
        session.seen, session.missing = {}, {}
        way = "back" if passed < 0 else "forward"
        return Finding("clock", f"the clock jumped {way} by {abs(jumped) / 1e9:.2f} s")
