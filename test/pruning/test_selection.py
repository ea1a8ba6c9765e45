# SPDX-License-Identifier: Apache-2.0
"""Selection against brute force over all subsets, by the rules of doc/explanation/method.md."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from clp_ros.checkpoints.units import UnitKind
from clp_ros.core.errors import ClpError
from clp_ros.pruning.selection import (
    CRITERIA,
    allowed_budgets,
    blocks,
    calibrated_threshold,
    criterion_scores,
    group_scores,
    nearest_allowed,
    select_layers,
)

SMOLVLA = (1, 2, 5, 6, 14, 15)  # the paper's Table 5
GROOT_DIT = (1, 2, 4, 5, 6, 7, 10, 11)


def kind(count, period=1, fixed=()):
    return UnitKind("layers", count, period, frozenset(fixed))


def alternates(removed, layers, period):
    kept = [layer for layer in range(layers) if layer not in removed]
    return all(layer % period == j % period for j, layer in enumerate(kept))


def brute_force(scores, budget, threshold, period):
    """All optimal sets by trying every subset."""
    candidates = [i + 1 for i, score in enumerate(scores) if score >= threshold]
    sets = [s for s in itertools.combinations(candidates, budget) if alternates(s, len(scores) + 1, period)]
    total = {s: sum(Fraction(scores[i - 1]) for i in s) for s in sets}
    return sorted(s for s in sets if total[s] == max(total.values()))


def brute_threshold(scores, budget, period):
    return max(t for t in scores if brute_force(scores, budget, t, period))


def draw(rng, ties):
    size = int(rng.integers(0, 10))
    return [float(x) for x in (rng.integers(0, 4, size) / 4 if ties else rng.normal(size=size))]


@pytest.mark.parametrize("period", [1, 2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_set_of_all_subsets(period, ties):
    rng = np.random.default_rng(period)
    refused = 0
    for _ in range(60):
        scores = draw(rng, ties)
        threshold = float(rng.choice([-9.0, 0.25, 0.5, *scores]))
        for budget in range(len(scores) + 1):
            optimal = brute_force(scores, budget, threshold, period)
            if optimal:
                assert select_layers(scores, budget, threshold, period) == optimal[0]
            else:
                refused += 1
                with pytest.raises(ClpError):
                    select_layers(scores, budget, threshold, period)
    assert refused > 20


@pytest.mark.parametrize("period", [1, 2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_without_a_threshold_the_largest_that_leaves_a_set(period, ties):
    rng = np.random.default_rng(10 + period)
    for _ in range(40):
        scores = draw(rng, ties)
        for budget in range(1, len(scores) + 1):
            threshold = brute_threshold(scores, budget, period)
            assert calibrated_threshold(scores, budget, period) == threshold
            assert select_layers(scores, budget, period=period) == brute_force(scores, budget, threshold, period)[0]


def test_what_a_refusal_suggests_works():
    rng = np.random.default_rng(3)
    seen = 0
    for _ in range(200):
        scores, period = draw(rng, ties=False), int(rng.integers(1, 5))
        threshold = float(rng.normal())
        for budget in range(len(scores) + 1):
            try:
                select_layers(scores, budget, threshold, period)
            except ClpError as error:
                seen += 1
                budgets, threshold_that_does = re.search(
                    r"a budget of ([\d or]+), or a threshold of at most (\S+)$", error.hint or ""
                ).groups()
                for other in budgets.split(" or "):
                    assert len(select_layers(scores, int(other), threshold, period)) == int(other)
                allowed = float(threshold_that_does)
                assert len(select_layers(scores, budget, allowed, period)) == budget
                with pytest.raises(ClpError):
                    select_layers(scores, budget, math.nextafter(allowed, math.inf), period)
    assert seen > 100


@pytest.mark.parametrize(("layers", "removed"), [(16, SMOLVLA), (16, GROOT_DIT)])
def test_the_sets_of_table_5(layers, removed):
    scores = np.random.default_rng(0).uniform(0.3, 0.6, layers - 1)
    scores[np.array(removed) - 1] = 0.99
    assert select_layers(scores, len(removed), period=2) == removed
    assert select_layers(scores.tolist(), len(removed), threshold=0.9, period=2) == removed
    assert alternates(removed, layers, 2)


def test_the_period_outweighs_a_greedy_choice():
    scores = np.full(15, 0.5)
    scores[[2, 8]] = 0.99  # layers 3 and 9 cannot go alone
    assert select_layers(scores, 2) == (3, 9)
    assert select_layers(scores, 2, period=2) == (2, 3)


def test_of_equal_totals_the_set_with_the_lower_layers():
    assert select_layers([0.1, 0.2, 0.3, 0.0, 0.3, 0.2, 0.1], 3, threshold=0.05) == (2, 3, 5)
    assert select_layers([0.5] * 9, 4, period=2) == (1, 2, 3, 4)
    assert calibrated_threshold([0.5] * 9, 4, 2) == 0.5


def test_nothing_to_remove():
    assert select_layers([0.9, 0.8], 0) == ()
    assert select_layers([], 0) == ()
    assert calibrated_threshold([0.9], 0) is None
    assert blocks([0.9], None) == ()


def test_all_but_the_first_can_go():
    assert select_layers([0.1, 0.2, 0.3], 3, period=2) == (1, 2, 3)
    with pytest.raises(ClpError, match="0 to 3"):
        select_layers([0.1, 0.2, 0.3], 4)
    with pytest.raises(ClpError, match="cannot remove -1"):
        select_layers([0.1, 0.2, 0.3], -1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_names_its_layer(bad):
    for function in (select_layers, calibrated_threshold, blocks):
        with pytest.raises(ClpError, match="layer 2"):
            function([0.9, bad, 0.8], 1)
    with pytest.raises(ClpError, match="threshold"):
        select_layers([0.9, 0.8], 1, threshold=math.nan)


def test_blocks_are_runs_with_their_anchor():
    scores = [0.9, 0.95, 0.1, 0.2, 0.9, 0.3, 0.9]
    assert blocks(scores, 0.9) == ((0, 1, 2), (4, 5), (6, 7))
    candidates = {layer for block in blocks(scores, 0.9) for layer in block[1:]}
    assert candidates == {i + 1 for i, score in enumerate(scores) if score >= 0.9}
    assert blocks(scores, 1.0) == ()
    assert blocks([1.0, 1.0], 0.0) == ((0, 1, 2),)


def test_a_group_is_the_mean_of_its_members_that_speak():
    vlm, expert = np.array([0.8, 0.6, 0.1]), np.array([0.4, 0.2, 0.7])
    got = group_scores({"vlm": vlm, "expert": expert}, last_output_unused={"vlm"})
    np.testing.assert_allclose(got, [0.6, 0.4, 0.7])
    np.testing.assert_allclose(group_scores({"vlm": vlm, "expert": expert}), [0.6, 0.4, 0.4])
    np.testing.assert_allclose(group_scores({"dit": vlm}, last_output_unused={"vlm"}), vlm)
    assert vlm[-1] == 0.1
    with pytest.raises(ValueError, match="one length"):
        group_scores({"vlm": vlm, "expert": expert[:2]})
    with pytest.raises(ValueError, match="output is unused"):
        group_scores({"vlm": vlm}, last_output_unused={"vlm"})


def test_criteria_rank_the_redundant_highest():
    mse = np.array([0.3, 0.1, 0.2])
    assert select_layers(criterion_scores("mse", 4, mse), 1) == (2,)
    assert select_layers(criterion_scores("mse", 4, mse), 2, threshold=-0.2) == (2, 3)
    assert select_layers(criterion_scores("cosine", 4, 1 - mse), 1) == (2,)
    assert select_layers(criterion_scores("cka", 4, 1 - mse), 2) == (2, 3)
    assert select_layers(criterion_scores("keep-first", 16), 6) == (10, 11, 12, 13, 14, 15)
    with pytest.raises(ClpError, match="keep-first"):
        criterion_scores("keep_first", 4)
    with pytest.raises(ValueError, match="needs 3"):
        criterion_scores("mse", 4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("budget", [1, 4, 6, 7])
def test_every_criterion_honours_the_period(criterion, budget):
    adjacent = np.random.default_rng(budget).uniform(size=15)
    removed = select_layers(criterion_scores(criterion, 16, adjacent, seed=budget), budget, period=4)
    assert len(removed) == budget
    assert alternates(removed, 16, 4)
    if criterion == "keep-first":
        assert removed == tuple(range(16 - budget, 16))


def test_random_is_seeded_and_reaches_every_set():
    draws = [select_layers(criterion_scores("random", 5, seed=seed), 2) for seed in range(200)]
    assert draws == [select_layers(criterion_scores("random", 5, seed=seed), 2) for seed in range(200)]
    assert set(draws) == set(itertools.combinations(range(1, 5), 2))


def test_the_papers_set_keeps_the_kinds_alternating_and_layers_must_be_there():
    assert nearest_allowed(SMOLVLA, kind(16, 2)) == (SMOLVLA,)
    assert nearest_allowed((13, 14, 15), kind(16, 2)) == ((13, 14, 15),)
    with pytest.raises(ClpError, match="no layer 16"):
        nearest_allowed((16,), kind(16, 2))
    with pytest.raises(ClpError, match="all 3"):
        nearest_allowed((0, 1, 2), kind(3))


@pytest.mark.parametrize("period", [1, 2, 3, 4])
def test_the_nearest_sets_of_all_subsets(period):
    layers = 7
    for size in range(1, layers):
        for removed in itertools.combinations(range(layers), size):
            allowed = [
                s
                for k in range(1, layers)
                for s in itertools.combinations(range(layers), k)
                if alternates(s, layers, period) and (0 in removed or 0 not in s)
            ]
            away = {s: len(set(s) ^ set(removed)) for s in allowed}
            nearest = sorted(
                (s for s in allowed if away[s] == min(away.values())),
                key=lambda s: (abs(len(s) - size), len(s), s),
            )
            assert nearest_allowed(removed, kind(layers, period), limit=99) == tuple(nearest)
            assert nearest_allowed(removed, kind(layers, period), limit=2) == tuple(nearest[:2])
            assert (nearest == [removed]) == alternates(removed, layers, period)


def test_nearest_to_what_a_user_types():
    assert nearest_allowed((2,), kind(16, 2)) == ((1, 2), (2, 3))
    assert nearest_allowed((), kind(16, 2)) == ((),)
    assert nearest_allowed(SMOLVLA, kind(16, 2)) == (SMOLVLA,)


@pytest.mark.parametrize("period", [1, 2, 4])
def test_fixed_layers_never_go(period):
    rng = np.random.default_rng(20 + period)
    impossible = 0
    for _ in range(40):
        scores = draw(rng, ties=False)
        layers = len(scores) + 1
        fixed = {int(layer) for layer in rng.integers(0, layers, rng.integers(0, 3))}
        sets = [
            s
            for size in range(layers)
            for s in itertools.combinations(range(1, layers), size)
            if alternates(s, layers, period) and not fixed & set(s)
        ]
        assert allowed_budgets(kind(layers, period, fixed)) == tuple(sorted({len(s) for s in sets}))
        for budget in range(layers):
            possible = [s for s in sets if len(s) == budget]
            if not possible:
                impossible += 1
                with pytest.raises(ClpError, match=f"no {budget} layers of {layers} .*use a budget of"):
                    select_layers(scores, budget, period=period, fixed=fixed)
                continue
            threshold = max((min(scores[i - 1] for i in s) for s in possible if s), default=-math.inf)
            candidates = [s for s in possible if all(scores[i - 1] >= threshold for i in s)]
            best = max(candidates, key=lambda s: sum(Fraction(scores[i - 1]) for i in s))
            assert select_layers(scores, budget, period=period, fixed=fixed) == best
            given = {layer for layer in range(layers) if rng.random() < 0.4}
            if 0 < len(given) < layers:
                for near in nearest_allowed(given, kind(layers, period, fixed)):
                    assert alternates(near, layers, period)
                    assert not fixed & set(near)
    assert impossible > 10
