# SPDX-License-Identifier: Apache-2.0
"""Statistics of success rates: an interval of one, and the comparison of two on the same starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided quantile of the normal distribution for 95 %.
_Z95 = 1.959963984540054


def success_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a success rate (Wilson 1927; scipy's implementation).

    Args:
        successes: Number of successes.
        episodes: Number of episodes, at least 1.
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class PairedComparison:
    """Two policies on the same starts.

    Attributes:
        both: Number of starts that both solved.
        only_a: Number of starts that only the first solved.
        only_b: Number of starts that only the second solved.
        neither: Number of starts that none solved.
        difference: Success rate of the second minus that of the first.
        interval: 95 % interval of the difference (Agresti and Min 2005, eq. 3: Wald's interval after half a start is
            added to each of the four counts).
        p_value: Two-sided p-value of McNemar's exact test: the probability of counts at least as uneven as ``only_a``
            and ``only_b`` if both policies succeed equally often.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def compare_paired(a: Sequence[bool], b: Sequence[bool]) -> PairedComparison:
    """Compares the successes of two policies on the same starts, in the same order.

    Args:
        a: Successes of the first policy; at least one start.
        b: Successes of the second policy.
    """
    from scipy.stats import binomtest

    pairs = list(zip(a, b, strict=True))
    only_a = sum(one and not other for one, other in pairs)
    only_b = sum(other and not one for one, other in pairs)
    both = sum(one and other for one, other in pairs)
    count, uneven = len(pairs), only_a + only_b
    p_value = float(binomtest(only_a, uneven, 0.5).pvalue) if uneven else 1.0
    centre = (only_b - only_a) / (count + 2)
    half = _Z95 * math.sqrt((uneven + 1) / (count + 2) - centre**2) / math.sqrt(count + 2)
    return PairedComparison(
        both,
        only_a,
        only_b,
        count - both - uneven,
        (only_b - only_a) / count,
        (max(-1.0, centre - half), min(1.0, centre + half)),
        p_value,
    )
