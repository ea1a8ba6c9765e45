# SPDX-License-Identifier: Apache-2.0
"""The part of a reference that a message begins with: the same curve, from about the time that was asked for on."""

import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

from clp_ros.control.reference import Reference

PERIOD_NS = 20_000_000


def reference(rng: np.random.Generator, rest_steps: int = 0) -> Reference:
    """Random knots on a grid, after a rest of some steps without knots."""
    steps = np.arange(30) + rest_steps
    positions, velocities = rng.normal(size=(2, 31, 3))
    velocities[:2], positions[1] = 0, positions[0]
    return Reference(np.concatenate([[0], steps + 1]) * PERIOD_NS, positions, velocities)


@pytest.mark.parametrize("rest_steps", [0, 40])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("step", [0, 7, 29])
def test_it_begins_less_than_a_period_early_and_is_the_same_curve(rest_steps: int, share: float, step: int) -> None:
    whole = reference(np.random.default_rng(0), rest_steps)
    time_ns = round((step + share) * PERIOD_NS)
    part = whole.beginning(time_ns, PERIOD_NS)
    assert time_ns - PERIOD_NS < part.times_ns[0] <= time_ns
    assert part.end_ns == whole.end_ns
    assert not np.diff(part.times_ns).astype(np.int64)[:1] % PERIOD_NS
    at = np.linspace(part.times_ns[0], whole.end_ns, 500)
    for order in (0, 1):
        expected, found = (
            CubicHermiteSpline(one.times_ns / 1e9, one.positions, one.velocities)(at / 1e9, nu=order)
            for one in (whole, part)
        )
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_before_its_first_knot_it_rested_and_after_its_last_it_rests() -> None:
    rng = np.random.default_rng(1)
    whole = reference(rng)
    early = whole.beginning(-3 * PERIOD_NS - 1, PERIOD_NS)
    assert early.times_ns[0] == -4 * PERIOD_NS
    np.testing.assert_array_equal(early.positions[:2], whole.positions[[0, 0]])
    late = whole.beginning(whole.end_ns + 5, PERIOD_NS)
    assert late.times_ns.tolist() == [whole.end_ns + 5]
    np.testing.assert_array_equal(late.positions, whole.positions[-1:])
    assert not late.velocities.any()
    moving = Reference(whole.times_ns[2:], whole.positions[2:], whole.velocities[2:])
    assert moving.beginning(0, PERIOD_NS) is moving
