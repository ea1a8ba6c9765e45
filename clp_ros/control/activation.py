# SPDX-License-Identifier: Apache-2.0
"""The state that the runner's threads share, and the locks that protect it."""

from __future__ import annotations

import threading

from clp_ros.control.session import Session


class Activation:
    """The runner's current session.

    A thread that needs both locks takes ``publishing`` before ``gate``.

    Attributes:
        gate: Protects the attributes below. It is held only briefly: nothing is computed or published meanwhile.
        publishing: Held while a message is published and while a safe stop is computed. So messages leave in the order
            in which they continue each other, and no message leaves after ``deactivate()`` or ``stop()`` has returned.
        session: The session; None while the runner is inactive.
        is_stopped: Whether the runner was stopped and must not be activated.
        is_closing: Whether the threads must end.
        working_s: When the policy began its current chunk, on ``time.monotonic``; None while it is idle. This is no
            attribute of the session, because a policy that hangs outlives its session.
    """

    def __init__(self) -> None:
        self.gate = threading.Condition()
        self.publishing = threading.RLock()
        self.session: Session | None = None
        self.is_stopped = False
        self.is_closing = False
        self.working_s: float | None = None

    def end_session(self) -> Session | None:
        """Ends the session, and returns it."""
        with self.gate:
            ended, self.session = self.session, None
        return ended
