# SPDX-License-Identifier: Apache-2.0
"""Calibrates on frames drawn from a live robot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clp_ros.calibration.calibrate import BAGS, Calibrator, check_seed, normalise_by_steps, prepare
from clp_ros.calibration.calibration_file import Calibration
from clp_ros.datasets.reservoir import FrameReservoir
from clp_ros.robots.embodiment import Embodiment

if TYPE_CHECKING:
    from clp_ros.policies.base import Policy
    from clp_ros.policies.statistics import Statistics


def make_reservoir(
    policy: Policy,
    embodiment: Embodiment,
    samples: int,
    seed: int,
    statistics: Statistics | str | None = None,
    notify: Callable[[str], None] | None = None,
) -> FrameReservoir:
    """Creates a reservoir of frames for a policy, and sets the policy's statistics and cameras.

    Args:
        policy: The policy.
        embodiment: The robot.
        samples: Number of frames.
        seed: Seed of the draw.
        statistics: As in :func:`clp_ros.calibration.calibrate.calibrate_bags`; ``bags`` means those of all usable
            control ticks received.
        notify: Called with a sentence for each thing the user should know.

    Raises:
        ClpError: The policy's features do not fit the embodiment, ``samples`` is below 1, or the seed is
            negative.
    """
    check_seed(seed)
    prepare(policy, embodiment, statistics, notify)
    return FrameReservoir(embodiment, samples, policy.chunk_size, seed, keep_states=statistics == BAGS)


def calibrate_live(
    policy: Policy,
    reservoir: FrameReservoir,
    task: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibrates on the frames of a reservoir, and ends its reception.

    Args:
        policy: The policy.
        reservoir: A result of :func:`make_reservoir`.
        task: The instruction.
        seed: Seed of each frame's noise and time.
        progress: Called with (done, total) after each frame.

    Raises:
        ClpError: The reservoir is empty, an image cannot be decoded, or a hidden state is not finite.
    """
    reservoir.end_episode()  # this may draw one more frame
    if reservoir.steps is not None and reservoir.steps.states:
        normalise_by_steps(policy, reservoir.embodiment, [reservoir.steps])
    calibrator = Calibrator(policy, task, seed, reservoir.held)
    for frame in reservoir.frames():
        calibrator.add(frame)
        if progress is not None:
            progress(calibrator.samples, reservoir.held)
    return calibrator.finish(
        {
            "embodiment": reservoir.embodiment.name,
            "actions": reservoir.embodiment.actions.source,
            "episodes": reservoir.episodes,
            "bags": [],
            "live": {
                "messages": dict(reservoir.messages),
                "usable_ticks": reservoir.usable,
                "unusable_ticks": dict(reservoir.unusable),
                "dropped_messages": reservoir.dropped,
            },
        }
    )
