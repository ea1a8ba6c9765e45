# SPDX-License-Identifier: Apache-2.0
"""Makes chunks and sends them: observation, inference, joining, sending. One thread does all of it."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from clp_ros.control.activation import Activation
from clp_ros.control.chunk_schedule import LateError, ScheduleSettings
from clp_ros.control.fault_handler import FaultHandler
from clp_ros.control.inputs import IncompleteError, LiveInputs, Selected
from clp_ros.control.output import Planned, TrajectoryOutput
from clp_ros.control.processor_share import ProcessorShare
from clp_ros.control.replan import ReplanConfig
from clp_ros.control.run_log import RunLog
from clp_ros.control.safety import OutsideError
from clp_ros.control.session import Session
from clp_ros.control.statistics import Statistics, largest_by_unit
from clp_ros.control.watchdog import OUTSIDE, Watchdog, WatchdogConfig
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Policy
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.observation import NotReadyError
from clp_ros.robots.trajectory import chunk_positions

# Longest sleep of the worker when no frame wakes it.
POLL_S = 0.05
# How often a chunk is joined again after another message was sent meanwhile, such as a safe stop.
_PLANS = 3
# Number of latest chunks from which the latency is estimated.
_RECENT_CHUNKS = 20


class ChunkWorker:
    """Makes and sends the chunks of one runner. :meth:`run` is the thread's loop.

    Args:
        activation: The runner's shared state.
        faults: Handles faults.
        embodiment: The robot.
        inputs: The robot's messages.
        policy: Makes chunks.
        output: Sends chunks.
        watchdog: Checks the clock before a chunk is sent.
        replan: When chunks are made.
        schedule: How chunks are joined.
        watchdog_config: Its ``policy_timeout_s`` bounds the time of one chunk.
        clock_ns: Returns the time on the robot's clock, in nanoseconds.
        notify: Called with a level of :mod:`logging` and a text for the user.
        run_log: Records every chunk.
        statistics: Counts and measures chunks.
        processor: Detects a policy that waits for the processor; None: not checked.

    Attributes:
        instruction: The task that the policy gets. Any thread may set it.
    """

    def __init__(
        self,
        activation: Activation,
        faults: FaultHandler,
        embodiment: Embodiment,
        inputs: LiveInputs,
        policy: Policy,
        output: TrajectoryOutput,
        watchdog: Watchdog,
        *,
        instruction: str,
        replan: ReplanConfig,
        schedule: ScheduleSettings,
        watchdog_config: WatchdogConfig,
        clock_ns: Callable[[], int],
        notify: Callable[[int, str], None],
        run_log: RunLog,
        statistics: Statistics,
        processor: ProcessorShare | None,
    ) -> None:
        self.instruction = instruction
        self._activation = activation
        self._faults = faults
        self._embodiment = embodiment
        self._inputs = inputs
        self._policy = policy
        self._output = output
        self._watchdog = watchdog
        self._replan = replan
        self._schedule = schedule
        self._watchdog_config = watchdog_config
        self._clock_ns = clock_ns
        self._notify = notify
        self._run_log = run_log
        self._statistics = statistics
        self._processor = processor
        self._latencies: deque[float] = deque(maxlen=_RECENT_CHUNKS)
        self._cameras = tuple(camera.topic for camera in embodiment.cameras.values())

    @property
    def latency_s(self) -> float:
        """Expected time from an observation until its chunk is sent: the 90th percentile of the last chunks."""
        latencies = sorted(self._latencies)
        return latencies[math.ceil(0.9 * len(latencies)) - 1] if latencies else 0.0

    def run(self) -> None:
        """Makes chunks while a session is active, until the runner closes."""
        while (session := self._wait_for_session()) is not None:
            # The version is read before the inputs, so that a frame received meanwhile ends the wait below at once.
            version = self._inputs.version
            if self._try_step(session):
                continue
            due_s = (session.due_ns - self._clock_ns()) / 1e9
            self._inputs.wait(version, min(due_s, POLL_S) if due_s > 0 else POLL_S)

    def _wait_for_session(self) -> Session | None:
        """Waits for a session and returns it; returns None when the runner closes."""
        activation = self._activation
        with activation.gate:
            activation.gate.wait_for(lambda: activation.is_closing or activation.session is not None)
            return None if activation.is_closing else activation.session

    def _try_step(self, session: Session) -> bool:
        """Makes a chunk if it is due, and handles every error. Returns whether a chunk was made without error."""
        try:
            return self._step(session)
        except IncompleteError:
            pass  # The watchdog reports missing inputs when they last.
        except LateError as late:
            self._statistics.count("late")
            self._faults.handle(session, "late", str(late), safe_stop=False)
        except OutsideError as outside:
            self._faults.handle(session, OUTSIDE, str(outside))
        except (ClpError, NotReadyError) as fault:
            self._statistics.count("refused")
            self._faults.handle(session, f"refused {getattr(fault, 'where', None) or ''}", str(fault))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a model may raise any error, and the node must go on
            kind = type(error).__name__
            self._statistics.count("policy errors")
            self._faults.handle(session, f"policy errors {kind}", f"{kind}: {error}")
        return False

    def _step(self, session: Session) -> bool:
        """Makes a chunk if it is due. Returns whether it was due."""
        now = self._clock_ns()
        if self._output.is_paused or now < session.due_ns:
            # Frames that have arrived before the chunk is due are too old for it.
            session.seen = self._inputs.newest_frames()
            return False
        if not self._inputs.has_newer(session.seen):
            self._inputs.decode_ahead(now, session.seen)
            return False
        selected = self._inputs.take(now, session.seen)
        self._output.check_state(self._inputs.state(now))
        session.seen = {topic: selected[topic][0] for topic in self._cameras}
        self._statistics.record("wait", (now - session.since_ns) / 1e6)
        for topic, (stamp, _) in selected.items():
            self._statistics.record(f"age {topic}", (now - stamp) / 1e6)
        try:
            self._make_chunk(session, now, selected)
        finally:
            self._activation.working_s = None
            session.since_ns = max(session.due_ns, self._clock_ns())
        return True

    def _make_chunk(self, session: Session, now: int, selected: Selected) -> None:
        """Decodes the selected messages, calls the policy, and sends the chunk."""
        started, jumps = time.perf_counter(), session.jumps
        observation = self._inputs.decode(now, selected)
        decoded = time.perf_counter()
        self._statistics.record("decode", (decoded - started) * 1e3)
        self._activation.working_s = begun_s = time.monotonic()
        with self._processor.measured() if self._processor else nullcontext():
            chunk = self._policy.predict_chunk(
                observation.images, observation.state, self.instruction, **self._continuation(session, now)
            )
        self._activation.working_s, worked_s = None, time.monotonic() - begun_s
        predicted = time.perf_counter()
        self._statistics.record("inference", (predicted - decoded) * 1e3)
        positions, limited = chunk_positions(chunk, self._embodiment)
        planned = self._join_and_send(session, now, jumps, worked_s, positions)
        if planned is None:
            return
        latency = (self._clock_ns() - now) / 1e9
        self._latencies.append(latency)
        milliseconds = {
            "decode": (decoded - started) * 1e3,
            "inference": (predicted - decoded) * 1e3,
            "send": (time.perf_counter() - predicted) * 1e3,
            "latency": latency * 1e3,
        }
        self._record(now, max(selected[topic][0] for topic in self._cameras), planned, limited, milliseconds)

    def _record(
        self, observed_ns: int, newest_ns: int, planned: Planned, limited: int, milliseconds: Mapping[str, float]
    ) -> None:
        """Records a chunk that was sent, in the statistics and the run log.

        Args:
            observed_ns: Time of the observation.
            newest_ns: Stamp of the newest image.
            planned: What was sent.
            limited: Number of positions that were clipped to the limits.
            milliseconds: Durations by name. ``decode`` and ``inference`` are in the statistics already.
        """
        joined, sent_ns = planned.plan.joined, self._clock_ns()
        gaps = {
            (name, unit + per): value
            for name, values, per in (
                ("splice position gap", joined.position_gap, ""),
                ("splice velocity gap", joined.velocity_gap, "/s"),
                ("distance to chunk", joined.deviation, ""),
            )
            for unit, value in largest_by_unit(values, self._embodiment).items()
        }
        for name, value in {
            "send": milliseconds["send"],
            "latency": milliseconds["latency"],
            "image to trajectory": (sent_ns - newest_ns) / 1e6,
            **{f"{name} ({unit})": value for (name, unit), value in gaps.items()},
        }.items():
            self._statistics.record(name, value)
        self._statistics.count("chunks")
        self._statistics.count("limits hit", limited)
        self._run_log.write(
            "chunk",
            sent_ns,
            observed=observed_ns / 1e9,
            newest_image=newest_ns / 1e9,
            stamp=planned.stamp_ns / 1e9,
            splice=joined.splice_ns / 1e9,
            skipped=joined.skipped,
            limits_hit=limited,
            decode_ms=milliseconds["decode"],
            inference_ms=milliseconds["inference"],
            latency_ms=milliseconds["latency"],
            **{f"{name} {unit}".replace(" ", "_").replace("/", "_per_"): value for (name, unit), value in gaps.items()},
        )

    def _join_and_send(
        self, session: Session, now: int, jumps: int, worked_s: float, positions: np.ndarray
    ) -> Planned | None:
        """Joins a chunk to the reference and sends it.

        No lock is held while the chunk is joined. So a thread that stops the robot waits only while a message is
        published.

        Args:
            session: The session in which the chunk was begun.
            now: Time of the observation.
            jumps: ``session.jumps`` at the observation.
            worked_s: How long the policy took, in seconds.
            positions: (steps, joints), rad or m.

        Returns:
            What was sent; None if the chunk was dropped.
        """
        activation = self._activation
        for _ in range(_PLANS):
            if not self._may_be_sent(session, now, jumps, worked_s):
                return None
            try:
                state = self._inputs.state(self._clock_ns())
            except NotReadyError as missing:  # The watchdog stops the robot and reports the input when this lasts.
                self._statistics.count("dropped stale")
                session.observed_ns = None  # The policy's last chunk was not sent, so the policy must not continue it.
                raise IncompleteError([missing]) from None
            planned = self._output.plan(positions, now, state)
            with activation.publishing:
                with activation.gate:
                    is_same = activation.session is session and session.jumps == jumps
                if not is_same or self._too_old(now, worked_s) is not None or not self._output.send(planned):
                    continue  # The runner was stopped, or another message was sent meanwhile.
                with activation.gate:
                    session.observed_ns, session.due_ns = now, self._due_ns(now, len(positions), planned)
                    session.fault = session.fault_reason = None
                    notified, session.notified = session.notified, False
            if notified:
                self._notify(logging.INFO, "sending again")
            return planned
        self._statistics.count("dropped stale")
        return None

    def _due_ns(self, observed_ns: int, steps: int, sent: Planned) -> int:
        """Returns the earliest time of the next observation, on the robot's clock."""
        expected_s = self.latency_s + self._schedule.send_lead_time_s
        splice_ns = self._output.clock_ns(sent.plan.joined.splice_ns)
        period_ns = self._embodiment.period_ns
        return self._replan.due_ns(self._schedule.mode, observed_ns, splice_ns, steps, period_ns, expected_s)

    def _may_be_sent(self, session: Session, now: int, jumps: int, worked_s: float) -> bool:
        """Returns whether a chunk may still be sent, and counts a chunk that is dropped.

        The caller must hold no lock, because this may stop the robot.
        """
        with self._activation.gate:
            is_over = self._activation.session is not session
            jump = None if is_over else self._watchdog.check_clock(session)
        if is_over:
            self._statistics.count("dropped deactivated")
            return False
        if jump is not None:
            self._faults.handle(session, jump.kind, jump.reason)
        if session.jumps != jumps or self._output.is_paused:
            self._statistics.count("dropped stale")
            session.observed_ns = None
            return False
        if (reason := self._too_old(now, worked_s)) is None:
            return True
        self._statistics.count("dropped stale")
        self._faults.handle(session, "stale", f"a chunk was dropped: {reason}")
        return False

    def _too_old(self, observed_ns: int, worked_s: float) -> str | None:
        """Returns why a chunk is too old to be sent, or None."""
        latency, timeout_s = (self._clock_ns() - observed_ns) / 1e9, self._watchdog_config.policy_timeout_s
        if worked_s > timeout_s:
            return f"the policy was at work for {worked_s:.2f} s, policy_timeout is {timeout_s:g} s"
        if not 0 <= latency <= self._replan.max_latency_s:
            return f"its observation was {latency:.2f} s old, max_latency is {self._replan.max_latency_s:g} s"
        return None

    def _continuation(self, session: Session, now: int) -> dict[str, Any]:
        """Returns the arguments with which the policy continues its last chunk, in mode ``rtc``."""
        if self._schedule.mode != "rtc" or session.observed_ns is None:
            return {}
        period, delay_s = self._embodiment.period_ns, self.latency_s + self._schedule.send_lead_time_s
        last, current, then = map(self._output.trajectory_ns, (session.observed_ns, now, now + round(delay_s * 1e9)))
        return {"elapsed_steps": round((current - last) / period), "delay_steps": math.ceil((then - current) / period)}
