# SPDX-License-Identifier: Apache-2.0
"""Trajectory time: the integral of the speed scaling."""

import numpy as np

from clp_ros.control.scaled_clock import ScaledClock

SECOND = 10**9


def integral(asked: int, times: np.ndarray, scalings: np.ndarray) -> float:
    """By the rectangle rule, which is exact here."""
    spans = np.diff(np.append(np.minimum(times, asked), asked))
    return min(times[0], asked) + (spans * scalings).sum()


def test_it_is_the_robots_clock_until_a_scaling_is_set() -> None:
    clock = ScaledClock()
    clock.set(1.0, 5 * SECOND)
    assert [clock.at(time) for time in (0, 7 * SECOND + 1)] == [0, 7 * SECOND + 1]


def test_it_is_the_integral_of_the_scaling() -> None:
    clock, rng = ScaledClock(), np.random.default_rng(0)
    times = np.sort(rng.integers(SECOND, 10 * SECOND, 40))
    scalings = rng.uniform(0, 1, 40)
    for time, scaling in zip(times, scalings, strict=True):
        clock.set(scaling, int(time))
    for asked in rng.integers(SECOND, 12 * SECOND, 50):
        assert abs(clock.at(int(asked)) - integral(asked, times, scalings)) < 100
    clock.shift(-3 * SECOND, 12 * SECOND)
    assert abs(clock.at(8 * SECOND) - (integral(11 * SECOND, times, scalings) - 3 * SECOND)) < 100
    clock.restart(20 * SECOND)
    assert clock.at(20 * SECOND) == 20 * SECOND
    assert clock.at(21 * SECOND) == 20 * SECOND + round(scalings[-1] * SECOND)


def test_a_pause_is_noticed_and_noise_is_not() -> None:
    clock = ScaledClock()
    clock.set(0.9995, SECOND)
    assert clock.at(3 * SECOND) == 3 * SECOND
    clock.set(0.0, 3 * SECOND)
    assert clock.is_paused
    assert clock.at(9 * SECOND) == 3 * SECOND


def test_a_change_between_a_jump_and_its_notice_counts_at_once() -> None:
    for jump in (-50 * SECOND, 50 * SECOND):
        clock = ScaledClock()
        clock.set(0.5, 100 * SECOND)
        now = 110 * SECOND + jump
        clock.set(0.25, now)
        clock.shift(jump, now)
        # 100 s, and 10 s at half the speed, moved as the clock was.
        assert clock.at(now) == 105 * SECOND + jump
        assert clock.at(now + 4 * SECOND) == 106 * SECOND + jump
