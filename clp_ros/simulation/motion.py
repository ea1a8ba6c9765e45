# SPDX-License-Identifier: Apache-2.0
"""A robot's motion through waypoints, as a scripted expert makes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clp_ros.robots.embodiment import Embodiment

# Of minimum-jerk motion over a way of 1 in a time of 1 (Flash and Hogan 1985).
_PEAK_VELOCITY, _PEAK_ACCELERATION = 1.875, 5.7735
# Share of a joint's limits that an expert uses.
_SHARE = 0.6


@dataclass(frozen=True)
class Part:
    """Some joints' way: at rest on each waypoint, along a minimum-jerk profile between two.

    Attributes:
        moments: (waypoints,) float64, seconds, increasing from 0.
        positions: (waypoints, joints) float64, rad or m.
    """

    moments: np.ndarray
    positions: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """(times, joints) float64; it stays where it ends."""
        following = np.clip(np.searchsorted(self.moments, seconds, side="right"), 1, len(self.moments) - 1)
        start, end = self.moments[following - 1], self.moments[following]
        share = np.clip((seconds - start) / (end - start), 0.0, 1.0)[:, None]
        blend = share**3 * (10 - 15 * share + 6 * share**2)
        return (1 - blend) * self.positions[following - 1] + blend * self.positions[following]


@dataclass(frozen=True)
class Motion:
    """All joints' way, one part after the other in the order of the action."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return max(float(part.moments[-1]) for part in self.parts)

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """(times, joints) float64, rad or m, at (times,) seconds from its beginning."""
        return np.concatenate([part.at(np.asarray(seconds, dtype=np.float64)) for part in self.parts], axis=1)


def through(embodiment: Embodiment, waypoints: np.ndarray, rest_s: float = 0.2) -> Motion:
    """A motion through waypoints, as fast as 0.6 of the joints' limits allow.

    Args:
        embodiment: The robot.
        waypoints: (waypoints, joints), rad or m.
        rest_s: At rest at the beginning.
    """
    velocity = np.array([joint.velocity for joint in embodiment.joints])
    acceleration = np.array([joint.acceleration or np.inf for joint in embodiment.joints])
    way = np.abs(np.diff(waypoints, axis=0))
    least = np.maximum(
        _PEAK_VELOCITY * way / (_SHARE * velocity), np.sqrt(_PEAK_ACCELERATION * way / (_SHARE * acceleration))
    )
    moments = np.concatenate([[0.0, rest_s], rest_s + np.cumsum(np.maximum(least.max(axis=1), 0.1))])
    return Motion((Part(moments, np.concatenate([waypoints[:1], waypoints])),))
