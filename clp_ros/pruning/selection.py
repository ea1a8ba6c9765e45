# SPDX-License-Identifier: Apache-2.0
"""Which layers go: from scores of neighbouring layers to a removal set (paper section 3, Algorithm 1; steps 3 and 4).

``scores[i]`` compares layer i with layer i + 1 and so belongs to layer i + 1, the one that would go; L layers have
L - 1 scores, and layer 0 never goes. Larger means more redundant.

Alternating layer kinds (``pattern_period`` of them, by index) must survive: the j-th kept layer has index = j modulo
the period. Reading upwards, a layer can be kept exactly where a multiple of the period was removed below it. So every
removed run has a length divisible by the period, but for a run at the end, which may have any length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike

from clp_ros.checkpoints.units import UnitKind
from clp_ros.core.errors import ClpError

CRITERIA = ("cka", "mse", "cosine", "random", "keep-first")
"""What layers can be chosen by: the paper's criterion, and those it is compared with (RQ2)."""


def select_units(
    scores: ArrayLike, budget: int, units: UnitKind, threshold: float | None = None
) -> tuple[tuple[int, ...], float | None]:
    """Picks the layers to remove, exactly.

    Of all sets of ``budget`` candidates (layers that are not protected and whose score is at least ``threshold``) that
    leave the kinds alternating, the one of largest total score. Totals are compared exactly (as fractions); among equal
    totals the set that comes first in lexicographic order is taken.

    Args:
        scores: (L-1,) float.
        budget: Number of layers to remove, k.
        units: The L layers and the constraints on their removal. ``min_left`` does not limit a given budget.
        threshold: Least score of a candidate, tau; the largest that leaves such a set if not given.

    Returns:
        The layers to remove, 0-based, sorted; and the threshold, None for budget 0 if it was not given.

    Raises:
        ClpError: A score is NaN or infinite, or no such set exists: the message says which budgets or thresholds do.
    """
    values = _values(scores)
    _check(values, budget, units)
    if threshold is not None and math.isnan(threshold):
        raise ClpError("threshold is not a number", hint="give a number, or none")
    if threshold is None and budget == 0:
        return (), None
    for least in [threshold] if threshold is not None else sorted(set(values), reverse=True):
        found = next(_best_sets(_gains(values, least, units), budget, units.pattern_period), None)
        if found is not None:
            return found, least
    raise _infeasible(values, budget, -math.inf if threshold is None else threshold, units)


def select_layers(
    scores: ArrayLike, budget: int, threshold: float | None = None, period: int = 1, fixed: Collection[int] = ()
) -> tuple[int, ...]:
    """The layers that :func:`select_units` removes, for ``period`` alternating layer kinds and ``fixed`` layers."""
    return select_units(scores, budget, _layer_units(scores, period, fixed), threshold)[0]


def calibrated_threshold(scores: ArrayLike, budget: int, period: int = 1, fixed: Collection[int] = ()) -> float | None:
    """The largest threshold tau that leaves a set of ``budget`` candidates; None for budget 0, which needs none.

    Args and errors as :func:`select_layers`. Where no layer is ``fixed``, one exists for every budget below L: the last
    layers can always go.
    """
    return select_units(scores, budget, _layer_units(scores, period, fixed))[1]


def allowed_budgets(units: UnitKind, scores: ArrayLike | None = None, threshold: float = -math.inf) -> tuple[int, ...]:
    """The numbers of layers that can go, from 0 up, sorted. Layer 0 never goes; ``min_left`` is not considered.

    Args:
        units: The L layers and the constraints on their removal.
        scores: (L-1,) float; None: whatever the scores.
        threshold: Least score of a layer that goes.
    """
    gains = _gains([0.0] * (units.count - 1) if scores is None else _values(scores), threshold, units)
    return tuple(
        size for size in range(len(gains)) if next(_best_sets(gains, size, units.pattern_period), None) is not None
    )


def blocks(scores: ArrayLike, threshold: float | None) -> tuple[tuple[int, ...], ...]:
    """Runs of layers whose neighbours score at least ``threshold`` (step 3).

    Returns:
        Blocks of two layers or more, each sorted; the first layer of a block is its anchor, which stays. No threshold
        (as of budget 0), no blocks.
    """
    found: list[list[int]] = []
    for layer, score in enumerate(_values(scores), start=1):
        if threshold is None or score < threshold:
            continue
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer - 1, layer])
    return tuple(tuple(block) for block in found)


def group_scores(adjacent: Mapping[str, ArrayLike], dead_last: Collection[str] = ()) -> np.ndarray:
    """Scores of coupled modules, which lose the same layers: the mean of the members' scores.

    Args:
        adjacent: Scores by module, (L-1,) each.
        dead_last: Modules whose last layer's output reaches nothing: their score for that layer says nothing about it
            and takes no part in the mean. Modules that are not in ``adjacent`` are ignored.

    Returns:
        (L-1,) float64.
    """
    if not adjacent:
        raise ValueError("a group needs a module")
    members = [np.array(scores, dtype=np.float64) for scores in adjacent.values()]
    if len({x.shape for x in members}) > 1 or members[0].ndim != 1:
        raise ValueError(f"modules of a group need scores of one length, not {[x.shape for x in members]}")
    mean = np.mean(members, axis=0)
    if len(mean):
        speaking = [x[-1] for name, x in zip(adjacent, members, strict=True) if name not in dead_last]
        if not speaking:
            raise ValueError(f"the last layer of every module of {', '.join(adjacent)} reaches nothing")
        mean[-1] = np.mean(speaking)
    return mean


def criterion_scores(criterion: str, layers: int, adjacent: ArrayLike | None = None, seed: int = 0) -> np.ndarray:
    """Scores by any criterion, larger for more redundant, for :func:`select_layers` (so all honour the period).

    Args:
        criterion: One of :data:`CRITERIA`. ``random`` ranks layers by a seeded draw; ``keep-first`` drops the last.
        layers: Layers of the module, L.
        adjacent: (L-1,) CKA, mean squared error or cosine of neighbours, for the criterion that needs it. A squared
            error becomes its negative, so that a threshold of -0.1 means errors of at most 0.1.
        seed: Seed of ``random``.

    Returns:
        (L-1,) float64.
    """
    if criterion not in CRITERIA:
        raise ClpError(f"unknown criterion {criterion!r}", hint=f"use one of {', '.join(CRITERIA)}")
    if criterion == "random":
        return np.random.default_rng(seed).permutation(np.arange(1, layers)) / layers
    if criterion == "keep-first":
        return np.arange(1, layers) / layers
    if adjacent is None or np.shape(adjacent) != (layers - 1,):
        raise ValueError(f"criterion {criterion!r} needs {layers - 1} adjacent scores")
    scores = np.array(adjacent, dtype=np.float64)
    return -scores if criterion == "mse" else scores


def nearest_allowed(removed: Collection[int], units: UnitKind, limit: int = 4) -> tuple[tuple[int, ...], ...]:
    """The removal sets nearest to this one that may go and keep the kinds alternating, for an error message.

    Nearest by the number of layers added and left out; of those, sets of the same size come first, then lexicographic
    order. Layer 0 is only in them if it was given, and the empty set is only told of the empty set.

    Args:
        removed: Layers that were to go, 0-based.
        units: The layers and the constraints on their removal. ``min_left`` is not considered.
        limit: Most sets to return.

    Returns:
        Sorted sets; ``removed`` itself alone if it may go. None where nothing may.

    Raises:
        ClpError: A layer is not there, or all would go.
    """
    layers = units.count
    gone = _removal(removed, layers)
    gains = [None if layer in units.protected else Fraction(1 if layer in gone else -1) for layer in range(layers)]
    if 0 not in gone:
        gains[0] = None
    near: dict[int, list[tuple[int, ...]]] = {}
    for size in sorted(range(1 if gone else 0, layers), key=lambda size: abs(size - len(gone))):
        for candidate in islice(_best_sets(gains, size, units.pattern_period), limit):
            near.setdefault(len(gone.symmetric_difference(candidate)), []).append(candidate)
    return tuple(near[min(near)][:limit]) if near else ()


def _values(scores: ArrayLike) -> list[float]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected (layers - 1,) scores, got shape {array.shape}")
    if not np.isfinite(array).all():
        layer = int(np.flatnonzero(~np.isfinite(array))[0]) + 1
        raise ClpError(f"score is {array[layer - 1]}", where=f"layer {layer}", hint="calibrate again")
    return array.tolist()


def _layer_units(scores: ArrayLike, period: int, fixed: Collection[int]) -> UnitKind:
    return UnitKind("layers", np.size(scores) + 1, period, frozenset(fixed))


def _check(values: Sequence[float], budget: int, units: UnitKind) -> None:
    if units.pattern_period < 1 or units.count != len(values) + 1:
        raise ValueError(f"{len(values)} scores do not fit {units}")
    if not 0 <= budget <= len(values):
        raise ClpError(
            f"cannot remove {budget} of {len(values) + 1} layers",
            hint=f"use a budget from 0 to {len(values)} (the first layer stays)",
        )


def _removal(removed: Collection[int], layers: int) -> frozenset[int]:
    gone = frozenset(removed)
    strangers = sorted(layer for layer in gone if not 0 <= layer < layers)
    if strangers:
        raise ClpError(
            f"no layer {', '.join(map(str, strangers))} in a module of {layers} layers",
            hint=f"layers are 0 to {layers - 1}",
        )
    if len(gone) == layers:
        raise ClpError(f"cannot remove all {layers} layers", hint="keep one")
    return gone


def _gains(values: Sequence[float], threshold: float, units: UnitKind) -> list[Fraction | None]:
    """What removing each layer adds to the total; None for layers that are no candidates (layer 0 never is)."""
    candidates = (
        Fraction(score) if score >= threshold and layer not in units.protected else None
        for layer, score in enumerate(values, start=1)
    )
    return [None, *candidates]


def _best_sets(gains: Sequence[Fraction | None], size: int, period: int) -> Iterator[tuple[int, ...]]:
    """All sets of ``size`` layers of largest total gain that leave the kinds alternating, in lexicographic order.

    Dynamic programming over (layer, number removed below it), which is all that decides whether a layer can be kept.
    """
    layers = len(gains)
    # best[i][r]: largest gain of layers i and up when r were removed below i; None where there is no way to the end.
    best: list[list[Fraction | None]] = [[None] * (size + 1) for _ in range(layers + 1)]
    best[layers][size] = Fraction(0)

    def gain_if_removed(layer: int, below: int) -> Fraction | None:
        gain, above = gains[layer], best[layer + 1][below + 1] if below < size else None
        return None if gain is None or above is None else gain + above

    def gain_if_kept(layer: int, below: int) -> Fraction | None:
        return best[layer + 1][below] if below % period == 0 else None

    for layer in reversed(range(layers)):
        for below in range(size + 1):
            ways = gain_if_removed(layer, below), gain_if_kept(layer, below)
            best[layer][below] = max((way for way in ways if way is not None), default=None)

    def walk(layer: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if layer == layers:
            yield chosen
            return
        below = len(chosen)
        # Removing before keeping: of sets of one size, the one with the lower layer comes first.
        if gain_if_removed(layer, below) == best[layer][below]:
            yield from walk(layer + 1, (*chosen, layer))
        if gain_if_kept(layer, below) == best[layer][below]:
            yield from walk(layer + 1, chosen)

    if best[0][0] is not None:
        yield from walk(0, ())


def _infeasible(values: Sequence[float], budget: int, threshold: float, units: UnitKind) -> ClpError:
    wanted = [f"have scores of {threshold:g} or more"] if threshold > -math.inf else []
    if inner := sorted(layer for layer in units.protected if 0 < layer < units.count):
        wanted.append(f"are none of those that have to stay ({', '.join(map(str, inner))})")
    if units.pattern_period > 1:
        wanted.append(f"leave its {units.pattern_period} kinds of layers alternating")
    possible = allowed_budgets(units, values, threshold)
    below = max(size for size in possible if size < budget)  # budget 0 always will do
    near = [below, *(size for size in possible if size > budget)][:2]
    hint = f"use a budget of {' or '.join(map(str, near))}"
    if budget in allowed_budgets(units):
        hint += f", or a threshold of at most {select_units(values, budget, units)[1]!r}"
    return ClpError(f"no {budget} layers of {units.count} {' and '.join(wanted)}", hint=hint)
