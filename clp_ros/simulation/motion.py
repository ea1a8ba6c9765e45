# SPDX-License-Identifier: Apache-2.0
"""The motion of a scripted expert: minimum-jerk segments between waypoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clp_ros.robots.embodiment import Embodiment

# Peaks of a minimum-jerk motion over distance 1 in time 1 (Flash and Hogan 1985).
_PEAK_VELOCITY, _PEAK_ACCELERATION = 1.875, 5.7735
# Share of the joints' limits that an expert uses.
_SHARE = 0.6


@dataclass(frozen=True)
class Part:
    """The motion of some joints: at rest at each waypoint, with a minimum-jerk profile between two.

    Attributes:
        moments: (waypoints,) float64: times in seconds, increasing from 0.
        positions: (waypoints, joints) float64: positions, rad or m.
    """

    moments: np.ndarray
    positions: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the positions at some times: (times, joints) float64. The motion stays at its end."""
        following = np.clip(np.searchsorted(self.moments, seconds, side="right"), 1, len(self.moments) - 1)
        start, end = self.moments[following - 1], self.moments[following]
        share = np.clip((seconds - start) / (end - start), 0.0, 1.0)[:, None]
        blend = share**3 * (10 - 15 * share + 6 * share**2)
        return (1 - blend) * self.positions[following - 1] + blend * self.positions[following]


@dataclass(frozen=True)
class Motion:
    """The motion of all joints.

    Attributes:
        parts: The parts, in the order of the action.
    """

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return max(float(part.moments[-1]) for part in self.parts)

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the positions at some times.

        Args:
            seconds: (times,) from the beginning, in seconds.

        Returns:
            (times, joints) float64, rad or m.
        """
        return np.concatenate([part.at(np.asarray(seconds, dtype=np.float64)) for part in self.parts], axis=1)


def through(embodiment: Embodiment, waypoints: np.ndarray, rest_s: float = 0.2) -> Motion:
    """Returns a motion through waypoints, as fast as 60 % of the joints' limits allow.

    Args:
        embodiment: The robot.
        waypoints: (waypoints, joints), rad or m.
        rest_s: Time at rest at the beginning, in seconds.
    """
    velocity = np.array([joint.velocity for joint in embodiment.joints])
    acceleration = np.array([joint.acceleration or np.inf for joint in embodiment.joints])
    distance = np.abs(np.diff(waypoints, axis=0))
    least = np.maximum(
        _PEAK_VELOCITY * distance / (_SHARE * velocity),
        np.sqrt(_PEAK_ACCELERATION * distance / (_SHARE * acceleration)),
    )
    moments = np.concatenate([[0.0, rest_s], rest_s + np.cumsum(np.maximum(least.max(axis=1), 0.1))])
    return Motion((Part(moments, np.concatenate([waypoints[:1], waypoints])),))
