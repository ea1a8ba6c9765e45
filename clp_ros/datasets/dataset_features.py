# SPDX-License-Identifier: Apache-2.0
"""What a LeRobotDataset stores of a robot: its features, and the values of each frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import Frame
from clp_ros.robots.embodiment import Embodiment

STATE, ACTION, STAMPS = "observation.state", "action", "stamps"
"""Features of every dataset, and the one with the original stamps."""


@dataclass(frozen=True)
class FrameFormat:
    """How frames are stored.

    Attributes:
        embodiment: The robot.
        video: Whether pictures are stored as video; otherwise as PNG files.
        size: (width, height) to which pictures are scaled, pixels; None: as they are.
        stamps: Whether the original stamps are stored, in the feature ``stamps``.
    """

    embodiment: Embodiment
    video: bool = True
    size: tuple[int, int] | None = None
    stamps: bool = False

    @property
    def cameras(self) -> list[str]:
        """The features with pictures."""
        return [camera.feature for camera in self.embodiment.cameras.values()]

    @property
    def stamped_topics(self) -> list[str]:
        """The topics whose stamps are stored, in the order of the feature's components after the first."""
        return list(self.embodiment.demonstration_topics)

    def features(self, frame: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns the features for ``LeRobotDataset.create``.

        Args:
            frame: A result of :meth:`values`; it gives the pictures' sizes.
        """
        joints, kind = joint_names(self.embodiment), "video" if self.video else "image"
        vector = {"dtype": "float32", "shape": (len(joints),), "names": joints}
        features: dict[str, dict[str, Any]] = {
            name: {"dtype": kind, "shape": frame[name].shape, "names": ["height", "width", "channels"]}
            for name in self.cameras
        }
        features |= {STATE: vector, ACTION: dict(vector)}
        if self.stamps:
            names = ["tick", *self.stamped_topics]
            features[STAMPS] = {"dtype": "int64", "shape": (len(names),), "names": names}
        return features

    def values(self, frame: Frame) -> dict[str, Any]:
        """Returns the values of a frame by feature, with its pictures at the size to store.

        Raises:
            ClpError: A picture cannot be stored as video.
        """
        observation = frame.observation
        values: dict[str, Any] = {}
        for name in self.cameras:
            values[name] = self._picture(name, observation.images[name])
        values |= {STATE: observation.state, ACTION: frame.action}
        if self.stamps:
            stamps = {**frame.action_stamps, **observation.stamps}
            ticks = [observation.tick_ns, *(stamps.get(topic, 0) for topic in self.stamped_topics)]
            values[STAMPS] = np.array(ticks, dtype=np.int64)
        return values

    def _picture(self, name: str, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if self.size is not None and (width, height) != self.size:
            # INTER_AREA averages the pixels that become one, which no other method of OpenCV does.
            shrinks = self.size[0] < width or self.size[1] < height
            picture = cv2.resize(picture, self.size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
            height, width = picture.shape[:2]
        if self.video and (height % 2 or width % 2):
            raise ClpError(
                f"a video's width and height are even, but the pictures are {width}x{height}",
                where=name,
                hint="give --resize with even numbers, or --images png",
            )
        return picture


def joint_names(embodiment: Embodiment) -> list[str]:
    """Returns the names of the components of state and action: the joints', or ``CONTROLLER/JOINT`` if not unique."""
    counts = Counter(joint.name for joint in embodiment.joints)
    return [
        joint.name if counts[joint.name] == 1 else f"{controller}/{joint.name}"
        for controller, entry in embodiment.controllers.items()
        for joint in entry.joints
    ]
