# SPDX-License-Identifier: Apache-2.0
"""Selects the layers to remove by the scores of adjacent layers (paper section 3, Algorithm 1, steps 3 and 4).

``scores[i]`` compares layer i with layer i + 1 and belongs to layer i + 1, the candidate for removal. L layers have L -
1 scores; layer 0 always stays. A larger score means more redundant.

The remaining layers must alternate in kind as before (``pattern_period`` kinds, by index): the j-th kept layer has an
index congruent to j modulo the period. A layer can be kept if and only if the number of layers removed before it is a
multiple of the period. So every removed run has a length divisible by the period, except a run at the end.
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
"""The criteria of the selection: the paper's, and those it is compared with (RQ2)."""


def select_units(
    scores: ArrayLike, budget: int, units: UnitKind, threshold: float | None = None
) -> tuple[tuple[int, ...], float | None]:
    """Selects the layers to remove, by exact optimisation.

    Of all sets of ``budget`` candidates (layers that are not protected and whose score is at least ``threshold``) that
    leave the kinds alternating, the one with the largest total score is selected. Totals are compared exactly, as
    fractions. Among equal totals, the first set in lexicographic order is selected.

    Args:
        scores: (L-1,) float.
        budget: Number of layers to remove, k.
        units: The L layers and the constraints on their removal. ``min_left`` does not limit a given budget.
        threshold: Minimum score of a candidate, tau; by default the largest that leaves such a set.

    Returns:
        The layers to remove, 0-based, sorted; and the threshold, None for budget 0 if it was not given.

    Raises:
        ClpError: A score is NaN or infinite, or there is no such set. The message names budgets or thresholds that
            work.
    """
    values = _values(scores)
    _check(values, budget, units)
    if threshold is not None and math.isnan(threshold):
        raise ClpError("not a number", where="threshold", hint="give a number, or none")
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
    """Returns the layers that :func:`select_units` removes, for ``period`` alternating kinds and protected layers
    ``fixed``."""
    return select_units(scores, budget, _layer_units(scores, period, fixed), threshold)[0]


def calibrated_threshold(scores: ArrayLike, budget: int, period: int = 1, fixed: Collection[int] = ()) -> float | None:
    """Returns the largest threshold tau that leaves a set of ``budget`` candidates; None for budget 0.

    Args and errors as :func:`select_layers`. If no layer is ``fixed``, there is one for every budget below L, because
    the last layers can always be removed.
    """
    return select_units(scores, budget, _layer_units(scores, period, fixed))[1]


def allowed_budgets(units: UnitKind, scores: ArrayLike | None = None, threshold: float = -math.inf) -> tuple[int, ...]:
    """Returns the possible numbers of removed layers, sorted, from 0. Layer 0 stays; ``min_left`` is not considered.

    Args:
        units: The L layers and the constraints on their removal.
        scores: (L-1,) float; None: all scores are allowed.
        threshold: Minimum score of a removed layer.
    """
    gains = _gains([0.0] * (units.count - 1) if scores is None else _values(scores), threshold, units)
    return tuple(
        size for size in range(len(gains)) if next(_best_sets(gains, size, units.pattern_period), None) is not None
    )


def blocks(scores: ArrayLike, threshold: float | None) -> tuple[tuple[int, ...], ...]:
    """Returns the runs of layers with scores of at least ``threshold`` (step 3).

    Returns:
        Blocks of two layers or more, each sorted; the first layer of a block is its anchor, which stays. Empty if the
        threshold is None.
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


def group_scores(adjacent: Mapping[str, ArrayLike], last_output_unused: Collection[str] = ()) -> np.ndarray:
    """Returns the scores of coupled layer stacks, which lose the same layers: the mean of their scores.

    Args:
        adjacent: Scores by module, (L-1,) each.
        last_output_unused: Stacks whose last layer's output is not used. Their score of that layer is left out of the
            mean. Names that are not in ``adjacent`` are ignored.

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
        used = [x[-1] for name, x in zip(adjacent, members, strict=True) if name not in last_output_unused]
        if not used:
            raise ValueError(f"the last layer's output is unused in every module of {', '.join(adjacent)}")
        mean[-1] = np.mean(used)
    return mean


def criterion_scores(criterion: str, layers: int, adjacent: ArrayLike | None = None, seed: int = 0) -> np.ndarray:
    """Returns the scores of a criterion for :func:`select_layers`, larger for more redundant.

    Args:
        criterion: One of :data:`CRITERIA`. ``random`` ranks layers by a seeded draw; ``keep-first`` removes the last
            layers.
        layers: Layers of the module, L.
        adjacent: (L-1,) CKA, mean squared error or cosine of adjacent layers, for criteria that need it. The score of a
            squared error is its negative, so that a threshold of -0.1 means errors of at most 0.1.
        seed: Seed of ``random``.

    Returns:
        (L-1,) float64.
    """
    if criterion not in CRITERIA:
        raise ClpError(f"unknown criterion {criterion!r}", where="criterion", hint=f"use one of {', '.join(CRITERIA)}")
    if criterion == "random":
        return np.random.default_rng(seed).permutation(np.arange(1, layers)) / layers
    if criterion == "keep-first":
        return np.arange(1, layers) / layers
    if adjacent is None or np.shape(adjacent) != (layers - 1,):
        raise ValueError(f"criterion {criterion!r} needs {layers - 1} adjacent scores")
    scores = np.array(adjacent, dtype=np.float64)
    return -scores if criterion == "mse" else scores


def nearest_allowed(removed: Collection[int], units: UnitKind, limit: int = 4) -> tuple[tuple[int, ...], ...]:
    """Returns the allowed removal sets that are nearest to this one, for an error message.

    The distance is the number of layers added and left out. Among the nearest, sets of the same size come first, then
    lexicographic order. Layer 0 is included only if it was given. The empty set is returned only for the empty set.

    Args:
        removed: The requested layers, 0-based.
        units: The layers and the constraints on their removal. ``min_left`` is not considered.
        limit: Maximum number of sets.

    Returns:
        Sorted sets; only ``removed`` if it is allowed; empty if no set is allowed.

    Raises:
        ClpError: A layer does not exist, or no layer would be left.
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
    """Returns what each layer adds to the total score if removed; None for layers that are not candidates, as layer
    0."""
    candidates = (
        Fraction(score) if score >= threshold and layer not in units.protected else None
        for layer, score in enumerate(values, start=1)
    )
    return [None, *candidates]


def _best_sets(gains: Sequence[Fraction | None], size: int, period: int) -> Iterator[tuple[int, ...]]:
    """Yields all sets of ``size`` layers with the largest total gain that leave the kinds alternating, in lexicographic
    order.

    Dynamic programming over (layer, number of layers removed before it), which decide whether a layer can be kept.
    """
    layers = len(gains)
    # best[i][r]: largest gain of layers from i on if r layers before i were removed; None if no set is possible.
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
        # Removal is tried first: of sets of one size, the one with the lower layer is first.
        if gain_if_removed(layer, below) == best[layer][below]:
            yield from walk(layer + 1, (*chosen, layer))
        if gain_if_kept(layer, below) == best[layer][below]:
            yield from walk(layer + 1, chosen)

    if best[0][0] is not None:
        yield from walk(0, ())


def _infeasible(values: Sequence[float], budget: int, threshold: float, units: UnitKind) -> ClpError:
    wanted = [f"have scores of {threshold:g} or more"] if threshold > -math.inf else []
    if inner := sorted(layer for layer in units.protected if 0 < layer < units.count):
        wanted.append(f"are none of the protected ({', '.join(map(str, inner))})")
    if units.pattern_period > 1:
        wanted.append(f"leave its {units.pattern_period} kinds of layers alternating")
    possible = allowed_budgets(units, values, threshold)
    below = max(size for size in possible if size < budget)  # budget 0 always works
    near = [below, *(size for size in possible if size > budget)][:2]
    hint = f"use a budget of {' or '.join(map(str, near))}"
    if budget in allowed_budgets(units):
        hint += f", or a threshold of at most {select_units(values, budget, units)[1]!r}"
    return ClpError(f"no {budget} layers of {units.count} {' and '.join(wanted)}", hint=hint)
