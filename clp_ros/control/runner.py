# SPDX-License-Identifier: Apache-2.0
"""The loop that drives a robot: the latest complete observation in, a chunk out, in a thread of its own.

Nothing here knows ROS. Which thread runs what: the owner's threads call every public method of :class:`ChunkRunner`,
none of which waits for the policy but :meth:`ChunkRunner.close`; the worker alone decodes, predicts and sends chunks;
the watchdog looks at the inputs, the clock and the worker once a control step, and stops the robot when one fails.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np

from clp_ros.control.chunk_schedule import LateError, ScheduleSettings
from clp_ros.control.inputs import IncompleteError, LiveInputs
from clp_ros.control.output import Planned, TrajectoryOutput
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.replan import ReplanConfig
from clp_ros.control.run_log import RunLog
from clp_ros.control.safety import OutsideError
from clp_ros.control.session import Session
from clp_ros.control.statistics import Statistics, largest_by_unit
from clp_ros.control.watchdog import OUTSIDE, PAUSED, Fault, Watchdog, WatchdogConfig
from clp_ros.core.errors import ClpError
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError
from clp_ros.robots.trajectory import Trajectory, chunk_positions

# What may differ in the words of one and the same fault.
_NUMBER = re.compile(r"\b0x[0-9a-f]+|\d+(?:\.\d+)?")
# How long the worker sleeps at most when no frame wakes it.
POLL_S = 0.05
# The same fault is told at most this often.
LOG_AGAIN_S = 30.0
# So often is a chunk joined anew where something else was sent meanwhile, as a brake.
_PLANS = 3
# A speed scaling of more than this is none: it is in another unit, or of another meaning.
_LARGEST_SCALING = 1.05
# Latency is estimated from so many chunks.
_RECENT_CHUNKS = 20


class Policy(Protocol):
    """What the runner needs of a policy; :class:`clp_ros.policies.lerobot_policy.LoadedPolicy` has it."""

    def predict_chunk(
        self, images: Mapping[str, np.ndarray], state: np.ndarray, task: str, **continuing: Any
    ) -> np.ndarray:
        """An action chunk, (steps, action_size), in the policy's units.

        ``continuing`` is given in mode ``rtc`` only: see
        :meth:`clp_ros.policies.lerobot_policy.LoadedPolicy.predict_chunk`.
        """


class ChunkRunner:
    """Makes a chunk whenever every camera has a newer frame and the pace allows, joins it to the last, and sends it.

    A fault never ends the loop: the robot is braked to rest and held there, a person is told why once, and the loop
    goes on when the fault is over.

    Args:
        embodiment: The robot.
        inputs: Where its messages come in.
        policy: What turns observations into chunks. Only the worker calls it, one chunk at a time.
        instruction: What the policy is told to do; :attr:`instruction` can be set at any time.
        replan: When chunks are made.
        send: Sends what ``serialise`` returned. Called by the worker, the watchdog, and the threads
            that deactivate or stop, one at a time.
        clock_ns: The time on the messages' clock, nanoseconds. May jump.
        tell: Tells a person: a level of the logging module, and a line.
        schedule: How chunks are joined.
        watchdog: When the watchdog stops the robot.
        failed: Called, by a thread of its own, when there were too many faults or the watchdog failed. Nothing is
            sent any more then.
        log: Where every chunk and fault is written down.
        processor: Tells when the policy waits for the processor; None where it does not run on one.
        serialise: Makes of trajectories, one a controller, what is sent. Called as ``send`` is, but the worker calls it
            while others may send.

    Attributes:
        statistics: Counts ``chunks``, ``safe stops``, ``late``, ``dropped stale``, ``dropped deactivated``,
            ``refused``, ``policy errors`` and ``limits hit`` (positions moved to a joint's limit); milliseconds of
            ``wait`` (from when a chunk was due to its observation), ``decode``, ``inference``, ``send``, ``latency``
            (from the observation until sent) and ``image to trajectory`` (from the newest image's stamp until sent),
            and of ``age <topic>`` (how old each message was when it was used). Of the joints of each unit (``rad``,
            ``m``, ``normalised``): ``splice position gap``, ``splice velocity gap``, how far a chunk was from what the
            robot follows, and ``distance to chunk``, how far the robot is led from the chunk at most.
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
        self.instruction = instruction
        self.statistics = Statistics()
        self._embodiment = embodiment
        self._inputs = inputs
        self._policy = policy
        self._replan = replan
        self._clock_ns = clock_ns
        self._notify = notify
        self._schedule = schedule or ScheduleSettings()
        self._watchdog_config = watchdog or WatchdogConfig()
        self._failed = failed or (lambda _: None)
        self._log = log or RunLog(None)
        self._processor = processor
        self._output = TrajectoryOutput(embodiment, self._schedule, send, clock_ns, serialise)
        self._watchdog = Watchdog(inputs, self._output, self._watchdog_config, clock_ns)
        self._scaling: float | None = None
        self._notified: dict[str, float] = {}
        self._latencies: deque[float] = deque(maxlen=_RECENT_CHUNKS)
        self._cameras = tuple(camera.topic for camera in embodiment.cameras.values())
        # Guards what is below. It is held for moments only: nothing is computed or published meanwhile.
        self._gate = threading.Condition()
        # Held while a message is published, and while a brake is computed, so that messages leave in the order in
        # which each follows on from the last, and none leaves once deactivate() or stop() has returned. It is taken
        # before the gate, never by a thread that holds the gate.
        self._publishing = threading.RLock()
        self._session: Session | None = None
        self._stopped = False
        self._closing = False
        # Since when the policy has been at work on a chunk. Not the session's: one that hangs outlives it.
        self._working_s: float | None = None
        # Daemons: a policy that hangs must not keep the process alive after close() has given up on it.
        self._worker = threading.Thread(target=self._run, name="policy", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._worker.start()
        self._watcher.start()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called since the last :meth:`clear_stop`."""
        return self._stopped

    @property
    def fault_reason(self) -> str | None:
        """Why the robot is held at present, though active; None while all is well."""
        session = self._session
        return session.fault_reason if session else None

    @property
    def faults(self) -> int:
        """Number of faults since the activation."""
        session = self._session
        return session.faults if session else 0

    @property
    def latency_s(self) -> float:
        """What a chunk is expected to take from its observation until it is sent: the 90th percentile of the last."""
        latencies = sorted(self._latencies)
        return latencies[math.ceil(0.9 * len(latencies)) - 1] if latencies else 0.0

    @property
    def speed_scaling(self) -> float | None:
        """The robot's speed scaling, 1 at full speed; None where it was never published."""
        return self._scaling

    def set_speed_scaling(self, scaling: float) -> None:
        """Takes note of the robot's speed scaling, 1 at full speed.

        Slightly more than 1 is the noise of its measurement, and counts as 1. What cannot be used counts as published
        and stale: the robot is not taken to move at full speed.

        Raises:
            ClpError: It is no number from 0 to 1: a controller that is sped up would exceed the robot's limits.
        """
        if not 0 <= scaling <= _LARGEST_SCALING:
            if self._watchdog.scaling_s is None:
                self._watchdog.scaling_s = time.monotonic()
            raise ClpError(
                f"a speed scaling of {100 * scaling:g} %",
                where=self._embodiment.name,
                fix="publish 0 to 100, or take speed_scaling out of the embodiment",
            )
        scaling = min(scaling, 1.0)
        self._scaling = scaling
        self._watchdog.scaling_s = time.monotonic()
        self._output.set_speed_scaling(scaling)

    def clear_stop(self) -> None:
        """Ends a :meth:`stop`: :meth:`activate` may be called again."""
        with self._gate:
            self._stopped = False

    def activate(self, from_measured: Collection[str] = ()) -> bool:
        """Starts sending. The first chunk is made of frames that came after this.

        Args:
            from_measured: The controllers that begin a new trajectory at the measured state: see
                :meth:`TrajectoryOutput.start`.

        Returns:
            Whether it did: not after a :meth:`stop`, which lasts until :meth:`clear_stop`.
        """
        with self._publishing:
            now = self._clock_ns()
            with self._gate:
                if self._stopped:
                    return False
                self._output.start(from_measured)
                self._session = Session(now, now, self._inputs.newest_frames(), now, time.monotonic())
                self._gate.notify_all()
            self._log.write("activated", now, instruction=self.instruction)
            return True

    def deactivate(self) -> None:
        """Brakes the robot to rest, and sends nothing more. A chunk that is being made is thrown away."""
        self._end("deactivated")

    def stop(self) -> None:
        """As :meth:`deactivate`; it cannot be activated until :meth:`clear_stop`."""
        with self._gate:
            self._stopped = True
        self._end("stopped")

    def close(self, timeout_s: float | None = None) -> bool:
        """As :meth:`deactivate`, and ends the threads; waits for the policy if it is at work.

        Returns:
            Whether the worker has ended; False: the policy was still at work after ``timeout_s``.
        """
        try:
            with self._gate:
                self._closing = True
                self._gate.notify_all()
            self._end("closed")
        finally:  # also when the stop cannot be sent any more
            self._inputs.wake()
            self._watcher.join()
            self._worker.join(timeout_s)
            self._log.close()
        return not self._worker.is_alive()

    def _end(self, event: str) -> None:
        with self._gate:
            ended, self._session = self._session, None
        with self._publishing:  # what is being published leaves first; nothing else does
            if ended is not None:
                self._output.safe_stop()
                self._log.write(event, self._clock_ns())
        self._inputs.wake()

    # ------------------------------------------------------------------------------------------------ the worker

    def _run(self) -> None:
        while True:
            with self._gate:
                self._gate.wait_for(lambda: self._closing or self._session is not None)
                if self._closing:
                    return
                session = self._session
            # Read before the inputs are looked at: a frame that comes while they are ends the wait after them at once.
            version = self._inputs.version
            try:
                if self._step(session):
                    continue
            except IncompleteError:
                pass  # the watchdog says so when it lasts
            except LateError as late:
                self.statistics.count("late")
                self._fault(session, "late", str(late), safe_stop=False)
            except OutsideError as outside:
                self._fault(session, OUTSIDE, str(outside))
            except (ClpError, NotReadyError) as fault:
                self.statistics.count("refused")
                self._fault(session, f"refused {getattr(fault, 'where', None) or ''}", str(fault))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a model may raise anything; the node lives on
                kind = type(error).__name__
                self.statistics.count("policy errors")
                self._fault(session, f"policy errors {kind}", f"{kind}: {error}")
            due_s = (session.due_ns - self._clock_ns()) / 1e9
            self._inputs.wait(version, min(due_s, POLL_S) if due_s > 0 else POLL_S)

    def _step(self, session: Session) -> bool:
        """Makes a chunk if it is time; returns whether it was."""
        now = self._clock_ns()
        if self._output.is_paused:
            session.seen = self._inputs.newest_frames()
            return False
        if now < session.due_ns:
            # The frames that are used come in after the chunk is due: those that are here by then would be older.
            session.seen = self._inputs.newest_frames()
            return False
        if not self._inputs.has_newer(session.seen):
            self._inputs.decode_ahead(now, session.seen)
            return False
        selected = self._inputs.take(now, session.seen)
        self._output.check_state(self._inputs.state(now))
        session.seen = {topic: selected[topic][0] for topic in self._cameras}
        self.statistics.record("wait", (now - session.since_ns) / 1e6)
        for topic, (stamp, _) in selected.items():
            self.statistics.record(f"age {topic}", (now - stamp) / 1e6)
        try:
            self._chunk(session, now, selected)
        finally:
            self._working_s = None
            session.since_ns = max(session.due_ns, self._clock_ns())
        return True

    def _chunk(self, session: Session, now: int, selected: dict[str, tuple[int, Any]]) -> None:
        started, jumps = time.perf_counter(), session.jumps
        observation = self._inputs.decode(now, selected)
        decoded = time.perf_counter()
        self.statistics.record("decode", (decoded - started) * 1e3)
        self._working_s = begun_s = time.monotonic()
        with self._processor.measured() if self._processor else nullcontext():
            chunk = self._policy.predict_chunk(
                observation.images, observation.state, self.instruction, **self._continuing(session, now)
            )
        self._working_s, worked_s = None, time.monotonic() - begun_s
        predicted = time.perf_counter()
        self.statistics.record("inference", (predicted - decoded) * 1e3)
        positions, limited = chunk_positions(chunk, self._embodiment)
        planned = self._sent(session, now, jumps, worked_s, positions)
        if planned is None:
            return
        latency, joined = (self._clock_ns() - now) / 1e9, planned.plan.joined
        self._latencies.append(latency)
        gaps = {
            (name, unit + per): value
            for name, values, per in (
                ("splice position gap", joined.position_gap, ""),
                ("splice velocity gap", joined.velocity_gap, "/s"),
                ("distance to chunk", joined.deviation, ""),
            )
            for unit, value in largest_by_unit(values, self._embodiment).items()
        }
        newest = max(selected[topic][0] for topic in self._cameras)
        for name, value in {
            "send": (time.perf_counter() - predicted) * 1e3,
            "latency": latency * 1e3,
            "image to trajectory": (self._clock_ns() - newest) / 1e6,
            **{f"{name} ({unit})": value for (name, unit), value in gaps.items()},
        }.items():
            self.statistics.record(name, value)
        self.statistics.count("chunks")
        self.statistics.count("limits hit", limited)
        self._log.write(
            "chunk",
            self._clock_ns(),
            observed=now / 1e9,
            newest_image=newest / 1e9,
            stamp=planned.stamp_ns / 1e9,
            splice=joined.splice_ns / 1e9,
            skipped=joined.skipped,
            limits_hit=limited,
            decode_ms=(decoded - started) * 1e3,
            inference_ms=(predicted - decoded) * 1e3,
            latency_ms=latency * 1e3,
            **{f"{name} {unit}".replace(" ", "_").replace("/", "_per_"): value for (name, unit), value in gaps.items()},
        )

    def _sent(self, session: Session, now: int, jumps: int, worked_s: float, positions: np.ndarray) -> Planned | None:
        """Joins a chunk and sends it, (steps, joints) in rad or m; returns what was sent, None where it was dropped.

        No lock is held while the chunk is joined: whoever stops the robot waits for its messages to leave at most.
        """
        for _ in range(_PLANS):
            if not self._is_wanted(session, now, jumps, worked_s):
                return None
            try:
                state = self._inputs.state(self._clock_ns())
            except NotReadyError as missing:  # the watchdog brakes, and says so, when it lasts
                self.statistics.count("dropped stale")
                session.observed_ns = None  # the policy's last chunk is another one now
                raise IncompleteError([missing]) from None
            planned = self._output.plan(positions, now, state)
            with self._publishing:
                with self._gate:
                    is_same = self._session is session and session.jumps == jumps
                if not is_same or self._too_old(now, worked_s) is not None or not self._output.send(planned):
                    continue  # it was stopped, or something else was sent meanwhile
                with self._gate:
                    session.observed_ns, session.due_ns = now, self._due_ns(now, len(positions), planned)
                    notified, session.notified, session.fault, session.fault_reason = (
                        session.notified,
                        False,
                        None,
                        None,
                    )
            if notified:
                self._notify(logging.INFO, "sending again")
            return planned
        self.statistics.count("dropped stale")
        return None

    def _due_ns(self, observed_ns: int, steps: int, sent: Planned) -> int:
        """When the next observation may be made, on the robot's clock."""
        expected_s = self.latency_s + self._schedule.send_lead_time_s
        splice_ns = self._output.clock_ns(sent.plan.joined.splice_ns)
        period_ns = self._embodiment.period_ns
        return self._replan.due_ns(self._schedule.mode, observed_ns, splice_ns, steps, period_ns, expected_s)

    def _is_wanted(self, session: Session, now: int, jumps: int, worked_s: float) -> bool:
        """Whether a chunk may still be sent; counts one that may not. No lock may be held: it may have to brake."""
        with self._gate:
            is_over = self._session is not session
            jumped = None if is_over else self._watchdog.check_clock(session)
        if is_over:
            self.statistics.count("dropped deactivated")
            return False
        if jumped is not None:
            self._found(session, jumped)
        if session.jumps != jumps or self._output.is_paused:
            self.statistics.count("dropped stale")
            session.observed_ns = None
            return False
        if (why := self._too_old(now, worked_s)) is None:
            return True
        self.statistics.count("dropped stale")
        self._fault(session, "stale", f"a chunk was dropped: {why}")
        return False

    def _too_old(self, observed_ns: int, worked_s: float) -> str | None:
        """Why a chunk is too old to be sent; None where it is not."""
        latency = (self._clock_ns() - observed_ns) / 1e9
        if worked_s > (limit_s := self._watchdog_config.policy_timeout_s):
            return f"the policy was at work for {worked_s:.2f} s, policy_timeout is {limit_s:g} s"
        if not 0 <= latency <= self._replan.max_latency_s:
            return f"its observation was {latency:.2f} s old, max_latency is {self._replan.max_latency_s:g} s"
        return None

    def _continuing(self, session: Session, now: int) -> dict[str, int]:
        """What a policy needs to continue its last chunk, in mode ``rtc``."""
        if self._schedule.mode != "rtc" or session.observed_ns is None:
            return {}
        period, delay_s = self._embodiment.period_ns, self.latency_s + self._schedule.send_lead_time_s
        last, current, then = map(self._output.trajectory_ns, (session.observed_ns, now, now + round(delay_s * 1e9)))
        return {"elapsed_steps": round((current - last) / period), "delay_steps": math.ceil((then - current) / period)}

    # ------------------------------------------------------------------------------------------------ the watchdog

    def _watch(self) -> None:
        while True:
            with self._gate:
                if self._gate.wait_for(lambda: self._closing, self._embodiment.period_ns / 1e9):
                    return
                session = self._session
                if session is None:
                    continue
                try:
                    found, failed = self._watchdog.check(session, self._working_s), None
                except Exception as error:  # noqa: BLE001 - nobody would watch the robot any more, and nobody know
                    found, failed = None, error
            try:
                if failed is not None:
                    raise failed
                if found is not None:
                    self._found(session, found)
                if self._output.needs_refresh:
                    with self._publishing:
                        if self._session is session:
                            self._output.refresh()
            except Exception as error:  # noqa: BLE001 - as above
                if self._brake(session):
                    self._log.write("safe_stop", self._clock_ns(), why=str(error))
                self._give_up(session, f"the watchdog failed: {type(error).__name__}: {error}")

    def _found(self, session: Session, found: Fault) -> None:
        self._fault(session, found.kind, found.reason)

    def _fault(self, session: Session, kind: str, why: str, safe_stop: bool = True) -> None:
        """Brakes the robot, says why, and counts: once for what lasts, each time for a chunk that fails."""
        with self._gate:
            if self._session is not session:
                return
            lasting = session.fault == kind and not kind.startswith(("refused", "policy errors", "late", "stale"))
            session.fault, session.fault_reason = kind, why
            now = self._clock_ns()
            session.observed_ns = None  # whatever the policy made last, it was not sent
            session.faults += kind != PAUSED and not lasting
            faults = session.faults
        if safe_stop and self._brake(session):
            self.statistics.count("safe stops")
            self._log.write("safe_stop", now, why=why)
        if lasting:
            return
        self._log.write("fault", now, kind=kind, why=why)
        same = _NUMBER.sub("#", why)
        with self._gate:
            is_notified = time.monotonic() - self._notified.get(same, -LOG_AGAIN_S) < LOG_AGAIN_S
            if not is_notified:
                self._notified[same] = time.monotonic()
                session.notified = True
        if not is_notified:
            self._notify(logging.WARNING, f"safe stop: {why}")
        if kind != PAUSED and self._watchdog_config.max_faults and faults >= self._watchdog_config.max_faults:
            self._give_up(session, f"{faults} faults since the activation, the last: {why}")

    def _brake(self, session: Session) -> bool:
        """Brakes the robot; returns whether there was anything to brake.

        It raises nothing: the threads that call it must live on. Where a stop cannot be sent at the second try either,
        the robot follows what it has to its end, at rest, and the owner is told.
        """
        for _ in range(2):
            try:
                with self._publishing:
                    return self._session is session and self._output.safe_stop()
            except Exception as error:  # noqa: BLE001 - whatever prevents a stop from being sent
                why = f"the robot cannot be braked: {type(error).__name__}: {error}"
        self._give_up(session, why)
        return False

    def _give_up(self, session: Session, why: str) -> None:
        """Sends nothing any more, and tells the owner."""
        with self._gate:
            if self._session is not session:
                return  # somebody else has ended it
            self._session = None
        self._log.write("failed", self._clock_ns(), why=why)
        threading.Thread(target=self._failed, args=(why,), name="failed", daemon=True).start()
