# SPDX-License-Identifier: Apache-2.0
"""Intervals, paired tests and smoothness, against formulas and enumerations written out here."""

import itertools
import math

import numpy as np
import pytest

from clp_ros.evaluation.intervals import compare_paired, success_interval
from clp_ros.evaluation.outcome import log_dimensionless_jerk


@pytest.mark.parametrize(("successes", "episodes"), [(0, 20), (7, 50), (73, 100), (100, 100)])
def test_wilson_interval_solves_its_equation(successes: int, episodes: int) -> None:
    """The ends are the rates p with |p - observed| = z sqrt(p (1 - p) / n)."""
    observed = successes / episodes
    for end in success_interval(successes, episodes):
        z = abs(end - observed) / math.sqrt(end * (1 - end) / episodes) if 0 < end < 1 else 1.959964
        assert z == pytest.approx(1.959964, abs=1e-5)
    low, high = success_interval(successes, episodes)
    assert 0 <= low <= observed <= high <= 1


def test_mcnemar_is_exact() -> None:
    a = [True] * 9 + [False] * 2 + [True] * 5 + [False] * 4
    b = [False] * 9 + [True] * 2 + [True] * 5 + [False] * 4
    compared = compare_paired(a, b)
    assert (compared.only_a, compared.only_b, compared.both, compared.neither) == (9, 2, 5, 4)
    # Of all 2^11 ways in which the uneven starts could fall, those at least as uneven as 9 to 2.
    uneven = sum(abs(sum(way) - 5.5) >= 3.5 for way in itertools.product((0, 1), repeat=11))
    assert compared.p_value == pytest.approx(uneven / 2**11)
    assert compared.difference == pytest.approx(-7 / 20)
    assert compared.interval[0] < compared.difference < compared.interval[1] < 0


def test_difference_interval_covers() -> None:
    """In 95 % of many draws, within what 1000 draws show."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        ability = rng.normal(size=60)
        a, b = ability + rng.normal(size=60) > 0.2, ability + rng.normal(size=60) > -0.3
        low, high = compare_paired(a.tolist(), b.tolist()).interval
        # P(N(0, 2) > 0.2) and P(N(0, 2) > -0.3)
        true = 0.5 * math.erf(0.3 / 2) + 0.5 * math.erf(0.2 / 2)
        covered += low <= true <= high
    assert 930 <= covered <= 975


def test_policies_without_uneven_starts_do_not_differ() -> None:
    compared = compare_paired([True, False], [True, False])
    assert (compared.p_value, compared.difference) == (1.0, 0.0)


def test_smoothness_of_a_minimum_jerk_motion() -> None:
    """Its dimensionless jerk is 720 / 1.875^2, whatever its amplitude and duration."""
    for seconds, amplitude in ((1.0, 0.3), (4.0, 2.0)):
        s = np.linspace(0, 1, 2001)
        motion = amplitude * (10 * s**3 - 15 * s**4 + 6 * s**5)
        value = log_dimensionless_jerk(motion[:, None], seconds / 2000)
        assert value == pytest.approx(-math.log(720 / 1.875**2), abs=0.02)
    assert log_dimensionless_jerk(np.zeros((50, 2)), 0.02) is None
