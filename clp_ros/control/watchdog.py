# SPDX-License-Identifier: Apache-2.0
"""Detects faults of a robot that is being driven: of its inputs, its clock, its state, and the policy.

The watchdog checks once a control step, also while the policy is computing a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from clp_ros.control.inputs import LiveInputs
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.safety import OutsideError
from clp_ros.control.session import Session
from clp_ros.robots.observation import NotReadyError

OUTSIDE = "outside"
PAUSED = "paused"
# A robot that was paused for longer than this does not continue with the chunk from before the pause.
_PAUSE_S = 0.5
# The robot's clock has jumped if it advances by this much more than the computer's own clock between two checks.
JUMP_NS = 2 * 10**9


@dataclass(frozen=True)
class WatchdogConfig:
    """When the watchdog stops the robot.

    Attributes:
        input_timeout_s: Seconds that an input may be missing, stale, or stamped in the future.
        policy_timeout_s: Seconds that the policy may take for one chunk.
        max_faults: Number of faults since the activation after which the runner gives up; 0: no limit.
    """

    input_timeout_s: float = 0.3
    policy_timeout_s: float = 5.0
    max_faults: int = 20


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        kind: Identifies the fault. Consecutive checks that return the same kind report one lasting fault.
        reason: Describes the fault in words.
    """

    kind: str
    reason: str


class Watchdog:
    """Checks for faults. It sends nothing, and computes nothing that takes long.

    Not thread-safe: the caller must hold the lock of the session.

    Args:
        inputs: The robot's messages.
        output: The trajectory that the robot follows.
        config: When a fault is reported.
        clock_ns: Returns the time on the clock of the messages, in nanoseconds. This clock may jump.

    Attributes:
        scaling_s: When the last speed scaling was received, on ``time.monotonic``; None before the first.
    """

    def __init__(
        self, inputs: LiveInputs, output: TrajectoryOutput, config: WatchdogConfig, clock_ns: Callable[[], int]
    ) -> None:
        self._inputs = inputs
        self._output = output
        self._config = config
        self._clock_ns = clock_ns
        self.scaling_s: float | None = None
        # Since when the speed scaling has been 0, on time.monotonic.
        self._paused_s: float | None = None

    def check(self, session: Session, working_s: float | None) -> Fault | None:
        """Returns the present fault, or None.

        Args:
            session: The current activation. Its times and missing inputs are updated.
            working_s: When the policy began its current chunk, on ``time.monotonic``; None while it is idle.
        """
        if (jump := self.check_clock(session)) is not None:
            return jump
        now, now_s = session.last_ns, session.last_s
        if working_s is not None and now_s - working_s > self._config.policy_timeout_s:
            return Fault("policy hangs", f"the policy has been at work for {now_s - working_s:.1f} s")
        missing = self._inputs.missing(now)
        session.missing = {one.topic: session.missing.get(one.topic, now) for one in missing}
        for one in missing:
            if now - session.missing[one.topic] > self._config.input_timeout_s * 1e9:
                return Fault(f"{one.topic} {one.kind}", str(one))
        if self.scaling_s is not None and now_s - self.scaling_s > self._config.input_timeout_s:
            return Fault("speed scaling", f"no speed scaling for {now_s - self.scaling_s:.1f} s")
        self._paused_s = (self._paused_s or now_s) if self._output.is_paused else None
        if self._paused_s is not None and now_s - self._paused_s > _PAUSE_S:
            return Fault(PAUSED, "the robot is paused, or in a protective stop: its speed scaling is 0")
        try:
            self._output.check_state(self._inputs.state(now))
        except OutsideError as outside:
            return Fault(OUTSIDE, str(outside))
        except NotReadyError:
            pass  # The input is in session.missing, and has not been missing for long enough to be a fault.
        return None

    def check_clock(self, session: Session) -> Fault | None:
        """Returns a fault if the robot's clock has jumped since the last check, or None.

        After a jump, the stamps of all earlier messages are invalid. So the inputs are forgotten and the session's
        times begin anew.

        Args:
            session: The current activation.
        """
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
        direction = "back" if passed < 0 else "forward"
        return Fault("clock", f"the clock jumped {direction} by {abs(jumped) / 1e9:.2f} s")
