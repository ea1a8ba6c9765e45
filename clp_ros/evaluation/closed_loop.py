# SPDX-License-Identifier: Apache-2.0
"""One episode of a simulated task in closed loop: policy, the node's chunk control, controllers, simulated robot.

An episode is a generator: it yields an observation whenever a chunk is due, and is sent the chunk. So the caller can
run a policy once for the observations of several episodes. The clock is the simulated robot's, and the policy takes a
given time on it. There are no threads and no ROS, so an episode is reproducible and faster than real time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import numpy as np

from clp_ros.control.chunk_schedule import Mode, ScheduleSettings
from clp_ros.core.errors import ClpError
from clp_ros.evaluation.outcome import EpisodeOutcome, log_dimensionless_jerk
from clp_ros.robots.trajectory import chunk_positions
from clp_ros.simulation.closed_loop import START_NS, ScheduledSender
from clp_ros.simulation.task_simulation import TaskSimulation

# The policy node stops for good after so many faults (its default of max_faults).
_MAX_FAULTS = 20


@dataclass(frozen=True)
class LoopSettings:
    """How a policy drives a robot, as the parameters of the policy node of the same names.

    Attributes:
        mode: How chunks are joined.
        replan_steps: Control steps between the observations of two chunks; 0: as soon as possible.
        send_lead_time_s: Least time from sending a chunk until it takes effect, in seconds.
        latency_s: Time from an observation until its chunk is sent, in seconds.
        size: (width, height) of all pictures; None: those of ``picture_sizes`` of :func:`play_chunks`.
    """

    mode: Mode = "replace"
    replan_steps: int = 10
    send_lead_time_s: float = 0.02
    latency_s: float = 0.0
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoopObservation:
    """What a policy gets when a chunk is due. The attributes are arguments of ``Policy.predict_chunk``."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    task: str
    elapsed_steps: int | None = None
    delay_steps: int = 0


@dataclass
class Seconds:
    """Where the computer's time goes, in seconds."""

    policy: float = 0.0
    rendering: float = 0.0
    simulation: float = 0.0


@dataclass
class Snapshots:
    """Pictures of an episode for people, of the robot's first camera: (height, width, 3) uint8 each."""

    every_s: float = math.inf
    size: tuple[int, int] = (160, 120)
    taken: list[np.ndarray] = field(default_factory=list)


def start_hash(simulation: TaskSimulation) -> str:
    """Returns a hash of the present state, the objects' colours and the instruction."""
    digest = hashlib.sha256()
    data = simulation.data
    for values in (data.qpos, data.qvel, data.mocap_pos, data.mocap_quat, simulation.mujoco_model.geom_rgba):
        # Rounded, because MuJoCo's last bits differ between machines.
        digest.update(np.round(np.asarray(values, dtype=np.float64), 6).tobytes())
    digest.update(simulation.instruction().encode())
    return digest.hexdigest()[:12]


def play_chunks(
    simulation: TaskSimulation,
    seed: int,
    settings: LoopSettings,
    picture_sizes: Mapping[str, tuple[int, int]],
    seconds: Seconds | None = None,
    snapshots: Snapshots | None = None,
) -> Generator[LoopObservation, np.ndarray, EpisodeOutcome]:
    """Plays one episode, which ends with success, at the task's time limit, or after as many faults as stop the node.

    Args:
        simulation: The simulation. No other episode may use it meanwhile.
        seed: The start.
        settings: How the policy drives the robot.
        picture_sizes: (height, width) of each camera's picture, by the camera's feature. Others are not rendered.
        seconds: Adds the computer's time to this.
        snapshots: Pictures are added to this.

    Yields:
        The observation when a chunk is due. Send the chunk: (steps, joints), in the policy's units.

    Returns:
        The outcome.
    """
    episode = _Episode(simulation, seed, settings, picture_sizes, seconds or Seconds(), snapshots)
    return (yield from episode.play())


class _Episode:
    def __init__(
        self,
        simulation: TaskSimulation,
        seed: int,
        settings: LoopSettings,
        picture_sizes: Mapping[str, tuple[int, int]],
        seconds: Seconds,
        snapshots: Snapshots | None,
    ) -> None:
        self._simulation, self._seed, self._settings = simulation, seed, settings
        self._seconds, self._snapshots = seconds, snapshots
        embodiment = simulation.embodiment
        width_height = settings.size
        self._pictures = {
            name: (camera.feature, *(picture_sizes[camera.feature] if width_height is None else width_height[::-1]))
            for name, camera in embodiment.cameras.items()
            if camera.feature in picture_sizes
        }
        joints = embodiment.joints
        self._offset, self._scale = (np.array([getattr(one, part) for one in joints]) for part in ("offset", "scale"))
        self._turning = np.array([joint.unit == "rad" for joint in joints])
        self._commands: list[np.ndarray] = []
        self._limits_hit = 0
        self._observed_ns: int | None = None

    def play(self) -> Generator[LoopObservation, np.ndarray, EpisodeOutcome]:
        simulation, settings = self._simulation, self._settings
        simulation.reset(self._seed)
        start, instruction = start_hash(simulation), simulation.instruction()
        schedule = ScheduleSettings(settings.mode, settings.send_lead_time_s)
        sender = ScheduledSender(simulation, schedule, replan_steps=settings.replan_steps, latency_s=settings.latency_s)
        period, latency = simulation.embodiment.period_ns, round(settings.latency_s * 1e9)
        end = START_NS + round(simulation.task.time_limit_s * 1e9)
        tick = START_NS
        working: tuple[int, np.ndarray] | None = None
        while tick < end and simulation.success_s is None:
            self._step(tick)
            self._commands.append(simulation.commanded().positions)
            if working is None and sender.due(tick):
                chunk = yield self._observe(tick, instruction)
                working = tick, self._positions(chunk)
            # The chunk is sent when the latency has passed, which may be between two control steps.
            if working is not None and working[0] + latency < tick + period:
                observed_ns, positions = working
                sent_ns = observed_ns + latency
                self._step(sent_ns)
                self._send(sender, positions, observed_ns, sent_ns)
                working = None
            sender.tick(tick)
            self._snap(tick)
            tick += period
            if sender.counts["late"] + sender.counts["refused"] >= _MAX_FAULTS:
                break
        self._snap(None)
        solved_s = simulation.success_s
        commands = np.array(self._commands)[:, self._turning]
        return EpisodeOutcome(
            task=simulation.task.name,
            seed=self._seed,
            success=solved_s is not None,
            seconds=round(simulation.time_s if solved_s is None else solved_s, 3),
            start=start,
            instruction=instruction,
            chunks=sender.counts["chunks"],
            late=sender.counts["late"],
            refused=sender.counts["refused"],
            limits_hit=self._limits_hit,
            smoothness=log_dimensionless_jerk(commands, period / 1e9),
        )

    def _step(self, time_ns: int) -> None:
        begun = time.perf_counter()
        self._simulation.step(time_ns)
        self._seconds.simulation += time.perf_counter() - begun

    def _observe(self, now_ns: int, instruction: str) -> LoopObservation:
        begun = time.perf_counter()
        images = {
            feature: self._simulation.picture(name, height, width).copy()
            for name, (feature, height, width) in self._pictures.items()
        }
        self._seconds.rendering += time.perf_counter() - begun
        state = (self._simulation.measured() - self._offset) / self._scale
        elapsed, delay = None, 0
        if self._settings.mode == "rtc" and self._observed_ns is not None:
            period = self._simulation.embodiment.period_ns
            elapsed = round((now_ns - self._observed_ns) / period)
            delay = math.ceil((self._settings.latency_s + self._settings.send_lead_time_s) * 1e9 / period)
        return LoopObservation(images, state.astype(np.float32), instruction, elapsed, delay)

    def _positions(self, chunk: np.ndarray) -> np.ndarray:
        """Returns the chunk in rad or m, inside the limits. A chunk that is not finite is refused when it is sent."""
        embodiment = self._simulation.embodiment
        chunk = np.asarray(chunk)
        try:
            positions, clipped = chunk_positions(chunk, embodiment)
        except ClpError:
            if chunk.ndim != 2 or chunk.shape[1] != embodiment.action_size:
                raise
            return np.full(chunk.shape, np.nan)
        self._limits_hit += clipped
        return positions

    def _send(self, sender: ScheduledSender, positions: np.ndarray, observed_ns: int, now_ns: int) -> None:
        begun, sent = time.perf_counter(), sender.counts["chunks"]
        sender.chunk(positions, observed_ns, now_ns, self._simulation.measured())
        self._observed_ns = observed_ns if sender.counts["chunks"] > sent else None
        self._seconds.simulation += time.perf_counter() - begun

    def _snap(self, tick_ns: int | None) -> None:
        """Takes a picture for people if one is due at a tick; None: the last one."""
        shots = self._snapshots
        if shots is None:
            return
        if tick_ns is None or (tick_ns - START_NS) / 1e9 >= len(shots.taken) * shots.every_s or not shots.taken:
            begun = time.perf_counter()
            camera = next(iter(self._simulation.embodiment.cameras))
            width, height = shots.size
            shots.taken.append(self._simulation.picture(camera, height, width).copy())
            self._seconds.rendering += time.perf_counter() - begun
