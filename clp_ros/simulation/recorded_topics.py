# SPDX-License-Identifier: Apache-2.0
"""The topics of a recorded simulation: when their messages are due, and what they hold."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clp_ros.bags.writer import STORE, header
from clp_ros.messages.images import JPEG_FORMAT, encode_jpeg
from clp_ros.robots.embodiment import JOINT_STATE_TYPE, Embodiment
from clp_ros.simulation.robot import SimulatedRobot

EPOCH_NS = 1_750_000_000 * 10**9
"""Beginning of a simulation on the clock of the bags: 2025-06-15 15:06:40 UTC."""
APART_NS = 60 * 10**9
"""Time between the beginnings of two episodes, so that no two recordings overlap in time."""
JOINT_DELAY_MS, CAMERA_DELAY_MS = (0.4, 1.6), (4.0, 10.0)
"""Smallest and largest delay from the stamp to the reception, in ms. Images are exposed, compressed and sent first."""

# Time of the first image, and offset of each further robot's joint states: nothing is synchronised on a real robot.
_FIRST_PICTURE_NS, _JOINT_PHASE_NS = 7_300_000, 3_100_000


@dataclass(frozen=True)
class RecordingSettings:
    """Settings of a recording.

    Attributes:
        camera_rate: Images per second, on each topic.
        joint_state_rate: Joint states per second, on each topic.
        size: Width and height of the images; None: those of the embodiment.
        quality: Quality of the JPEGs, 1 to 100.
    """

    camera_rate: float = 30.0
    joint_state_rate: float = 100.0
    size: tuple[int, int] | None = None
    quality: int = 80


DEFAULT_SETTINGS = RecordingSettings()
"""The settings that are used if none are given."""


@dataclass(frozen=True)
class Source:
    """A topic. ``name`` is the camera, or the entry of ``joint_states``."""

    name: str
    topic: str
    kind: str
    frame: str
    rate: float
    phase_ns: int
    delay_ms: tuple[float, float]


class RecordedTopics:
    """The topics of one simulated robot.

    Args:
        robot: The robot.
        settings: Rates, size and quality.

    Attributes:
        sources: The topics.
    """

    def __init__(self, robot: SimulatedRobot, settings: RecordingSettings) -> None:
        self._robot, self._settings = robot, settings
        self.sources = _sources(robot.embodiment, settings)

    def due(self, seconds: float = math.inf) -> Iterator[tuple[int, Source]]:
        """Yields time (nanoseconds from the beginning) and topic of each message, in the order of time."""

        def of(source: Source) -> Iterator[tuple[int, Source]]:
            for number in itertools.count():
                time_ns = source.phase_ns + round(number * 1e9 / source.rate)
                if time_ns >= seconds * 1e9:
                    return
                yield time_ns, source

        return heapq.merge(*map(of, self.sources), key=operator.itemgetter(0))

    def message(self, source: Source, stamp_ns: int) -> Any:
        """Returns what a topic sends now, a message of :data:`clp_ros.bags.writer.STORE`."""
        head = header(stamp_ns, source.frame)
        if source.kind == JOINT_STATE_TYPE:
            names, positions, speeds = self._robot.joint_states(source.name)
            return STORE.types[source.kind](head, names, np.array(positions), np.array(speeds), np.empty(0))
        picture = self.picture(source.name)
        if source.kind.endswith("CompressedImage"):
            return STORE.types[source.kind](head, JPEG_FORMAT, encode_jpeg(picture, self._settings.quality))
        height, width, channels = picture.shape
        return STORE.types[source.kind](head, height, width, "rgb8", 0, width * channels, picture.reshape(-1))

    def picture(self, camera: str) -> np.ndarray:
        """Returns an image of one of the embodiment's cameras: (height, width, 3) uint8 RGB."""
        settings = self._robot.embodiment.cameras[camera]
        width, height = self._settings.size or (settings.width, settings.height)
        return self._robot.picture(camera, height, width)


def _sources(embodiment: Embodiment, settings: RecordingSettings) -> list[Source]:
    found = [
        Source(
            name, states.topic, JOINT_STATE_TYPE, "", settings.joint_state_rate, index * _JOINT_PHASE_NS, JOINT_DELAY_MS
        )
        for index, (name, states) in enumerate(embodiment.joint_states.items())
    ]
    between_ns = round(1e9 / settings.camera_rate / len(embodiment.cameras))
    for index, (name, camera) in enumerate(embodiment.cameras.items()):
        phase_ns = _FIRST_PICTURE_NS + index * between_ns
        frame = f"{name}_color_optical_frame"
        found.append(Source(name, camera.topic, camera.type, frame, settings.camera_rate, phase_ns, CAMERA_DELAY_MS))
    return found
