# SPDX-License-Identifier: Apache-2.0
"""The cubic between two knots, against scipy's."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import CubicHermiteSpline

from clp_ros.control.cubic import cubic


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 10.0), st.integers(1, 14))
def test_it_is_hermites(seed: int, span_s: float, joints: int) -> None:
    rng = np.random.default_rng(seed)
    positions, velocities = rng.normal(size=(2, 2, joints))
    share = rng.uniform(-0.5, 1.5, (20, 1))  # prolonged, too
    where, speed = cubic(share, span_s, positions, velocities)
    reference = CubicHermiteSpline([0.0, span_s], positions, velocities)
    np.testing.assert_allclose(where, reference(share[:, 0] * span_s), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(speed, reference(share[:, 0] * span_s, 1), rtol=1e-8, atol=1e-8 / span_s)


def test_each_point_may_have_knots_of_its_own() -> None:
    rng = np.random.default_rng(0)
    positions, velocities = rng.normal(size=(2, 2, 5, 3))
    share = rng.uniform(size=(5, 1))
    where, speed = cubic(share, 0.02, positions, velocities)
    for row in range(5):
        its = cubic(float(share[row, 0]), 0.02, positions[:, row], velocities[:, row])
        np.testing.assert_allclose(where[row], its[0])
        np.testing.assert_allclose(speed[row], its[1])
