# SPDX-License-Identifier: Apache-2.0
"""What happens on a fault: a safe stop, a notification, and an end after too many faults."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable

from clp_ros.control.activation import Activation
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.run_log import RunLog
from clp_ros.control.session import Session
from clp_ros.control.statistics import Statistics
from clp_ros.control.watchdog import PAUSED

# The numbers in a reason are ignored when two reasons are compared.
_NUMBER = re.compile(r"\b0x[0-9a-f]+|\d+(?:\.\d+)?")
# The user is notified of the same fault at most once in this time.
LOG_AGAIN_S = 30.0
# Faults of a single chunk. Each one counts, also when it has the same kind as the one before.
_OF_ONE_CHUNK = ("refused", "policy errors", "late", "stale")


class FaultHandler:
    """Handles the faults of one runner. Thread-safe; no caller may hold ``activation.gate``.

    Args:
        activation: The runner's shared state.
        output: Sends the safe stops.
        statistics: Counts ``safe stops``.
        run_log: Records faults and safe stops.
        notify: Called with a level of :mod:`logging` and a text for the user.
        failed: Called in a new thread, with the reason, when the runner gives up.
        clock_ns: Returns the time on the robot's clock, in nanoseconds.
        max_faults: Number of faults after which the runner gives up; 0: no limit.
    """

    def __init__(
        self,
        activation: Activation,
        output: TrajectoryOutput,
        statistics: Statistics,
        run_log: RunLog,
        *,
        notify: Callable[[int, str], None],
        failed: Callable[[str], None],
        clock_ns: Callable[[], int],
        max_faults: int,
    ) -> None:
        self._activation = activation
        self._output = output
        self._statistics = statistics
        self._run_log = run_log
        self._notify = notify
        self._failed = failed
        self._clock_ns = clock_ns
        self._max_faults = max_faults
        # When the user was last notified of a reason, on time.monotonic.
        self._notified: dict[str, float] = {}

    def handle(self, session: Session, kind: str, reason: str, safe_stop: bool = True) -> None:
        """Stops the robot, notifies the user, and counts the fault.

        A lasting fault counts once. A fault of a single chunk counts each time.

        Args:
            session: The session of the fault. A fault of an ended session is ignored.
            kind: Identifies the fault.
            reason: Describes the fault.
            safe_stop: Whether to stop the robot.
        """
        activation = self._activation
        with activation.gate:
            if activation.session is not session:
                return
            lasting = session.fault == kind and not kind.startswith(_OF_ONE_CHUNK)
            session.fault, session.fault_reason = kind, reason
            now = self._clock_ns()
            session.observed_ns = None  # The policy's last chunk was not sent, so the policy must not continue it.
            session.faults += kind != PAUSED and not lasting
            faults = session.faults
        if safe_stop and self.safe_stop(session):
            self._statistics.count("safe stops")
            self._run_log.write("safe_stop", now, why=reason)
        if lasting:
            return
        self._run_log.write("fault", now, kind=kind, why=reason)
        if self._is_news(session, reason):
            self._notify(logging.WARNING, f"safe stop: {reason}")
        if kind != PAUSED and self._max_faults and faults >= self._max_faults:
            self.give_up(session, f"{faults} faults since the activation, the last: {reason}")

    def _is_news(self, session: Session, reason: str) -> bool:
        """Whether the user has not been notified of a reason for :data:`LOG_AGAIN_S`."""
        same = _NUMBER.sub("#", reason)
        with self._activation.gate:
            if time.monotonic() - self._notified.get(same, -LOG_AGAIN_S) < LOG_AGAIN_S:
                return False
            self._notified[same] = time.monotonic()
            session.notified = True
            return True

    def safe_stop(self, session: Session) -> bool:
        """Brings the robot to rest. Raises nothing, because the threads that call this must not end.

        If the stop cannot be sent at the second attempt, the runner gives up. The robot then follows its trajectory to
        the end, where it rests.

        Returns:
            Whether the robot was moving.
        """
        reason = ""
        for _ in range(2):
            try:
                with self._activation.publishing:
                    return self._activation.session is session and self._output.safe_stop()
            except Exception as error:  # noqa: BLE001 - any error that prevents a stop from being sent
                reason = f"the robot cannot be braked: {type(error).__name__}: {error}"
        self.give_up(session, reason)
        return False

    def give_up(self, session: Session, reason: str) -> None:
        """Ends the session, so that nothing more is sent, and calls ``failed``."""
        with self._activation.gate:
            if self._activation.session is not session:
                return  # another thread has ended the session
            self._activation.session = None
        self._run_log.write("failed", self._clock_ns(), why=reason)
        threading.Thread(target=self._failed, args=(reason,), name="failed", daemon=True).start()
