# SPDX-License-Identifier: Apache-2.0
"""Drives a robot: observations in, trajectories out.

This module does not depend on ROS. Three kinds of threads are involved. The owner's threads call the public methods of
:class:`ChunkRunner`; only :meth:`ChunkRunner.close` waits for the policy. The worker decodes images, calls the policy
and sends chunks (:mod:`clp_ros.control.chunk_worker`). The watchdog checks the inputs, the clock and the worker once a
control step, and stops the robot on a fault (:mod:`clp_ros.control.watchdog`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from clp_ros.control.activation import Activation
from clp_ros.control.chunk_schedule import ScheduleSettings
from clp_ros.control.chunk_worker import ChunkWorker
from clp_ros.control.fault_handler import FaultHandler
from clp_ros.control.inputs import LiveInputs
from clp_ros.control.output import TrajectoryOutput
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.replan import ReplanConfig
from clp_ros.control.run_log import RunLog
from clp_ros.control.session import Session
from clp_ros.control.statistics import Statistics
from clp_ros.control.watchdog import Watchdog, WatchdogConfig
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Policy
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.trajectory import Trajectory

# A larger speed scaling is an error: it has another unit or another meaning.
_LARGEST_SCALING = 1.05


class ChunkRunner:
    """Makes a chunk when every camera has a newer frame and a chunk is due, joins it to the last one, and sends it.

    A fault does not end the loop. The robot is brought to rest, the user is notified once, and the loop continues when
    the fault is over.

    Args:
        embodiment: The robot.
        inputs: The robot's messages.
        policy: Makes chunks of observations. Only the worker calls it, for one chunk at a time.
        instruction: The task that the policy gets. :attr:`instruction` can be set at any time.
        replan: When chunks are made.
        send: Sends what ``serialise`` returned. The worker, the watchdog, and the threads that deactivate or stop call
            it, one at a time.
        clock_ns: Returns the time on the clock of the messages, in nanoseconds. This clock may jump.
        notify: Called with a level of :mod:`logging` and a text for the user.
        schedule: How chunks are joined.
        watchdog: When the watchdog stops the robot.
        failed: Called in a new thread, with the reason, after too many faults or when the watchdog failed. Nothing is
            sent after that.
        log: Records every chunk and fault.
        processor: Detects a policy that waits for the processor; None where the policy does not run on the CPU.
        serialise: Makes messages of trajectories, one per controller. The same threads call it as ``send``, but the
            worker calls it while other threads may send.

    Attributes:
        statistics: Counts ``chunks``, ``safe stops``, ``late``, ``dropped stale``, ``dropped deactivated``,
            ``refused``, ``policy errors`` and ``limits hit`` (positions clipped to a joint's limit). In milliseconds:
            ``wait`` (from when a chunk was due to its observation), ``decode``, ``inference``, ``send``, ``latency``
            (from the observation until sent), ``image to trajectory`` (from the stamp of the newest image until sent),
            and ``age <topic>`` (age of each message when it was used). For the joints of each unit (``rad``, ``m``,
            ``normalised``): ``splice position gap`` and ``splice velocity gap``, the distance of a chunk from the
            reference, and ``distance to chunk``, the largest distance of the new reference from the chunk.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        inputs: LiveInputs,
        policy: Policy,
        instruction: str,
        replan: ReplanConfig,
        send: Callable[[Any], None],
        *,
        clock_ns: Callable[[], int],
        notify: Callable[[int, str], None],
        schedule: ScheduleSettings | None = None,
        watchdog: WatchdogConfig | None = None,
        failed: Callable[[str], None] | None = None,
        log: RunLog | None = None,
        processor: ProcessorShare | None = None,
        serialise: Callable[[list[Trajectory]], Any] = lambda trajectories: trajectories,
    ) -> None:
        schedule, config = schedule or ScheduleSettings(), watchdog or WatchdogConfig()
        self.statistics = Statistics()
        self._embodiment = embodiment
        self._inputs = inputs
        self._clock_ns = clock_ns
        self._log = log or RunLog(None)
        self._scaling: float | None = None
        self._activation = Activation()
        self._output = TrajectoryOutput(embodiment, schedule, send, clock_ns, serialise)
        self._watchdog = Watchdog(inputs, self._output, config, clock_ns)
        self._faults = FaultHandler(
            self._activation,
            self._output,
            self.statistics,
            self._log,
            notify=notify,
            failed=failed or (lambda _: None),
            clock_ns=clock_ns,
            max_faults=config.max_faults,
        )
        self._worker = ChunkWorker(
            self._activation,
            self._faults,
            embodiment,
            inputs,
            policy,
            self._output,
            self._watchdog,
            instruction=instruction,
            replan=replan,
            schedule=schedule,
            watchdog_config=config,
            clock_ns=clock_ns,
            notify=notify,
            run_log=self._log,
            statistics=self.statistics,
            processor=processor,
        )
        # Daemons: a policy that hangs must not keep the process alive after close() has given up on it.
        self._working = threading.Thread(target=self._worker.run, name="policy", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._working.start()
        self._watching.start()

    @property
    def instruction(self) -> str:
        """The task that the policy gets. It can be set at any time."""
        return self._worker.instruction

    @instruction.setter
    def instruction(self, instruction: str) -> None:
        self._worker.instruction = instruction

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called since the last :meth:`clear_stop`."""
        return self._activation.is_stopped

    @property
    def fault_reason(self) -> str | None:
        """Why an active robot is stopped at present; None without a fault."""
        session = self._activation.session
        return session.fault_reason if session else None

    @property
    def faults(self) -> int:
        """Number of faults since the activation."""
        session = self._activation.session
        return session.faults if session else 0

    @property
    def latency_s(self) -> float:
        """Expected time from an observation until its chunk is sent, in seconds: the 90th percentile of the last."""
        return self._worker.latency_s

    @property
    def speed_scaling(self) -> float | None:
        """The robot's speed scaling, 1 at full speed; None before the first."""
        return self._scaling

    def set_speed_scaling(self, scaling: float) -> None:
        """Sets the robot's speed scaling.

        A value slightly above 1 is noise of the measurement, and counts as 1. After an invalid value, the speed scaling
        counts as published and stale, because the robot may not move at full speed.

        Args:
            scaling: 0 (paused) to 1 (full speed).

        Raises:
            ClpError: The value is not between 0 and 1. A controller that is sped up would exceed the robot's limits.
        """
        if not 0 <= scaling <= _LARGEST_SCALING:
            if self._watchdog.scaling_s is None:
                self._watchdog.scaling_s = time.monotonic()
            raise ClpError(
                f"the speed scaling is {100 * scaling:g} %",
                where=self._embodiment.name,
                hint="publish 0 to 100, or take speed_scaling out of the embodiment",
            )
        scaling = min(scaling, 1.0)
        self._scaling = scaling
        self._watchdog.scaling_s = time.monotonic()
        self._output.set_speed_scaling(scaling)

    def clear_stop(self) -> None:
        """Ends a :meth:`stop`, so that :meth:`activate` may be called again."""
        with self._activation.gate:
            self._activation.is_stopped = False

    def activate(self, from_measured: Collection[str] = ()) -> bool:
        """Starts sending. The first chunk is made of frames that are received after this call.

        Args:
            from_measured: The controllers that begin a new trajectory at the measured state. See
                :meth:`TrajectoryOutput.start`.

        Returns:
            Whether the runner is active. It is not after a :meth:`stop` without a :meth:`clear_stop`.
        """
        activation = self._activation
        with activation.publishing:
            now = self._clock_ns()
            with activation.gate:
                if activation.is_stopped:
                    return False
                self._output.start(from_measured)
                activation.session = Session(now, now, self._inputs.newest_frames(), now, time.monotonic())
                activation.gate.notify_all()
            self._log.write("activated", now, instruction=self.instruction)
            return True

    def deactivate(self) -> None:
        """Brings the robot to rest, and sends nothing more. A chunk that is being made is dropped."""
        self._end("deactivated")

    def stop(self) -> None:
        """Does the same as :meth:`deactivate`, and forbids :meth:`activate` until :meth:`clear_stop`."""
        with self._activation.gate:
            self._activation.is_stopped = True
        self._end("stopped")

    def close(self, timeout_s: float | None = None) -> bool:
        """Does the same as :meth:`deactivate`, and ends the threads.

        Args:
            timeout_s: How long to wait for the policy, in seconds; None: without limit.

        Returns:
            Whether the worker has ended. False: the policy is still computing.
        """
        try:
            with self._activation.gate:
                self._activation.is_closing = True
                self._activation.gate.notify_all()
            self._end("closed")
        finally:  # also if the stop cannot be sent any more
            self._inputs.wake()
            self._watching.join()
            self._working.join(timeout_s)
            self._log.close()
        return not self._working.is_alive()

    def _end(self, event: str) -> None:
        ended = self._activation.end_session()
        with self._activation.publishing:  # wait for a message that is being published; no other follows
            if ended is not None:
                self._output.safe_stop()
                self._log.write(event, self._clock_ns())
        self._inputs.wake()

    def _watch(self) -> None:
        """Runs the watchdog once a control step, in a thread of its own."""
        activation = self._activation
        while True:
            with activation.gate:
                if activation.gate.wait_for(lambda: activation.is_closing, self._embodiment.period_ns / 1e9):
                    return
                session = activation.session
                if session is None:
                    continue
                try:
                    fault, failure = self._watchdog.check(session, activation.working_s), None
                except Exception as error:  # noqa: BLE001 - a failed watchdog must stop the robot, see below
                    fault, failure = None, error
            try:
                if failure is not None:
                    raise failure
                if fault is not None:
                    self._faults.handle(session, fault.kind, fault.reason)
                if self._output.needs_refresh:
                    with activation.publishing:
                        if activation.session is session:
                            self._output.refresh()
            except Exception as error:  # noqa: BLE001 - the thread must not end without a stop
                if self._faults.safe_stop(session):
                    self._log.write("safe_stop", self._clock_ns(), why=str(error))
                self._faults.give_up(session, f"the watchdog failed: {type(error).__name__}: {error}")
