# SPDX-License-Identifier: Apache-2.0
"""Calibration on frames that were drawn from a live robot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clp_ros.pruning.calibration import Calibrator, check_fit, check_seed
from clp_ros.pruning.calibration_file import Calibration
from clp_ros.robots.embodiment import Embodiment
from clp_ros.robots.reservoir import FrameReservoir

if TYPE_CHECKING:
    from clp_ros.vla.policy import LoadedPolicy


def make_reservoir(policy: LoadedPolicy, embodiment: Embodiment, samples: int, seed: int) -> FrameReservoir:
    """A reservoir of frames for a policy.

    Raises:
        ClpError: The policy's features do not fit the embodiment, ``samples`` is below 1, or the seed is
            negative.
    """
    check_seed(seed)
    check_fit(policy, embodiment)
    return FrameReservoir(embodiment, samples, policy.chunk_size, seed)


def calibrate_live(
    policy: LoadedPolicy,
    reservoir: FrameReservoir,
    task: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibrates on the frames of a reservoir, which ends it.

    Args:
        policy: The policy.
        reservoir: From :func:`make_reservoir`.
        task: The instruction.
        seed: Each frame's noise and time.
        progress: Called with (done, total) after each frame.

    Raises:
        ClpError: The reservoir is empty, an image cannot be decoded, or a hidden state is not finite.
    """
    reservoir.end_episode()  # which may draw one frame more
    calibrator = Calibrator(policy, task, seed, reservoir.held)
    for frame in reservoir.frames():
        calibrator.add(frame)
        if progress is not None:
            progress(calibrator.samples, reservoir.held)
    return calibrator.finish(
        {
            "embodiment": reservoir.embodiment.name,
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
