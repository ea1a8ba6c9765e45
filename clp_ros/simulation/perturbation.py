# SPDX-License-Identifier: Apache-2.0
"""Pushes of a demonstration off its way, so that it shows how the expert recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Perturbation:
    """Random pushes of the commanded tool.

    Attributes:
        distance: Largest distance of a push, in metres; 0: no pushes.
        every_s: Mean time between two pushes, in seconds.
        seconds: Duration of a push.
        turn: Largest rotation about the vertical by a push, in rad for each metre of ``distance``.
    """

    distance: float = 0.0
    every_s: float = 1.2
    seconds: float = 0.3
    turn: float = 8.0


UNPERTURBED = Perturbation()
"""No pushes."""


class Pushes:
    """The pushes of one arm in one episode.

    Args:
        perturbation: How hard and how often.
        rng: Draws them.
        period_s: One control step, in seconds.
    """

    def __init__(self, perturbation: Perturbation, rng: np.random.Generator, period_s: float) -> None:
        self._settings, self._rng = perturbation, rng
        self._steps = max(1, round(perturbation.seconds / period_s))
        self._chance = period_s / perturbation.every_s
        self._left = 0
        self._push = np.zeros(6)

    def step(self, height: float) -> np.ndarray:
        """Returns this control step's push: (6,) change of the position in metres, and rotation vector in rad.

        Args:
            height: Height of the tool above the table, in metres. A low tool is not pushed down.
        """
        settings = self._settings
        if settings.distance and not self._left and self._rng.random() < self._chance:
            direction = self._rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            if height < 0.1:
                direction[2] = abs(direction[2])
            size = settings.distance * self._rng.uniform(0.3, 1.0)
            turn = settings.distance * settings.turn * self._rng.uniform(-1.0, 1.0)
            self._push = np.array([*(size * direction), 0.0, 0.0, turn])
            self._left = self._steps
        if not self._left:
            return np.zeros(6)
        # Half a sine wave, whose sum over the steps is one.
        phase = (self._steps - self._left + 0.5) / self._steps
        self._left -= 1
        return self._push * math.sin(math.pi * phase) * math.pi / (2 * self._steps)
