# SPDX-License-Identifier: Apache-2.0
"""Plans: budgets, thresholds and criteria of coupled modules, against an exhaustive search of its own."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from clp_ros.calibration.calibration_file import Calibration
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.pruning.arguments import parse_budgets, parse_removals
from clp_ros.pruning.plan import check_calibration, default_plan, make_plan

LAYERS = 10


def calibration(seed=0, layers=LAYERS, period=2, modules=None):
    rng = np.random.default_rng(seed)
    modules = modules or {
        "vlm": {"layers": layers, "group": "both", "period": period, "dead_last": True},
        "expert": {"layers": layers, "group": "both", "period": period, "dead_last": False},
    }
    matrices, mse, cosine = {}, {}, {}
    for name, module in modules.items():
        half = rng.uniform(0.5, 1.0, (module["layers"],) * 2)
        matrices[name] = (half + half.T) / 2
        mse[name] = rng.uniform(0, 3, module["layers"] - 1)
        cosine[name] = rng.uniform(-1, 1, module["layers"] - 1)
    return Calibration({"modules": modules, "checkpoint": {"path": "there", "fingerprint": "f"}}, matrices, mse, cosine)


def group_mean(found, measure):
    """Step 4: the mean of the members, without the VLM's last layer, whose output is not used."""
    vlm, expert = measure["vlm"], measure["expert"]
    return np.array([*((vlm[i] + expert[i]) / 2 for i in range(len(vlm) - 1)), expert[-1]])


def allowed(layers, size, period):
    """Every removal set without layer 0 whose kept layers alternate."""
    for removed in combinations(range(1, layers), size):
        kept = [layer for layer in range(layers) if layer not in removed]
        if all(layer % period == place % period for place, layer in enumerate(kept)):
            yield removed


def best(scores, size, period, least=-np.inf):
    sets = [s for s in allowed(len(scores) + 1, size, period) if all(scores[i - 1] >= least for i in s)]
    return max(sets, key=lambda s: sum(scores[i - 1] for i in s)) if sets else None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("period", [1, 2, 4])
def test_cka_mse_and_cosine_take_the_best_set_of_the_groups_mean(seed, period):
    found = calibration(seed, period=period)
    measures = {
        "cka": {name: np.array([m[i, i + 1] for i in range(LAYERS - 1)]) for name, m in found.matrices.items()},
        "mse": {name: -x for name, x in found.mse.items()},
        "cosine": found.cosine,
    }
    for criterion, measure in measures.items():
        scores = group_mean(found, measure)
        for budget in (1, 2, 3, 4, 7):
            plan = make_plan(found, {"vlm": budget}, criterion=criterion)
            (group,) = plan.groups
            np.testing.assert_allclose(group.scores, scores, rtol=1e-15)
            least = group.threshold
            assert group.removed == best(scores, budget, period, least)
            # No higher threshold leaves a set.
            above = [score for score in scores if score > least]
            assert all(best(scores, budget, period, score) is None for score in above)
            assert plan.removal == {"vlm": group.removed, "expert": group.removed}
            assert plan.thresholds == {"vlm": least, "expert": least}


@pytest.mark.parametrize("criterion", ["random", "keep-first"])
def test_criteria_without_measurements_honour_the_period_too(criterion):
    seen = set()
    for seed in range(6):
        for budget in range(1, LAYERS):
            (group,) = make_plan(calibration(), {"expert": budget}, criterion=criterion, seed=seed).groups
            assert group.removed in list(allowed(LAYERS, budget, 2))
            if criterion == "keep-first":
                assert group.removed == tuple(range(LAYERS - budget, LAYERS))
        seen.add(make_plan(calibration(), {"vlm": 4}, criterion=criterion, seed=seed).removal["vlm"])
    assert (len(seen) > 1) == (criterion == "random")


def test_the_last_layer_of_the_vlm_takes_no_part_in_the_mean():
    found = calibration()
    for value in (0.0, 1.0):
        matrix = found.matrices["vlm"]
        matrix[-2, -1] = matrix[-1, -2] = value
        assert make_plan(found, {"vlm": 1}).scores["vlm"][-1] == found.matrices["expert"][-2, -1]


def test_a_budget_by_either_name_is_the_groups():
    found = calibration()
    plans = [make_plan(found, budgets).removal for budgets in ({"vlm": 4}, {"expert": 4}, {"vlm": 4, "expert": 4})]
    assert plans[0] == plans[1] == plans[2]
    with pytest.raises(ClpError, match=r"vlm and expert: they lose the same layers, but their budgets differ"):
        make_plan(found, {"vlm": 4, "expert": 2})
    with pytest.raises(ClpError, match=r"budget: there is no module 'vln' \(hint: did you mean 'vlm'\?\)"):
        make_plan(found, {"vln": 4})
    for budget in (LAYERS, LAYERS + 5):
        with pytest.raises(ClpError, match=f"cannot remove {budget} of {LAYERS} layers"):
            make_plan(found, {"vlm": budget})


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_alone_removes_as_many_candidates_as_can_go(seed):
    found = calibration(seed)
    scores = group_mean(found, found.adjacent)
    for threshold in (0.0, *np.quantile(scores, [0.2, 0.5, 0.8]), scores.max()):
        (group,) = make_plan(found, threshold=threshold).groups
        sizes = [size for size in range(LAYERS) if best(scores, size, 2, threshold) is not None]
        assert group.threshold == threshold
        assert group.removed == best(scores, max(sizes), 2, threshold)
    assert make_plan(found, threshold=scores.max() + 1e-9).removal == {"vlm": (), "expert": ()}
    with pytest.raises(ClpError, match="the threshold is nan"):
        make_plan(found, threshold=float("nan"))


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_with_a_threshold_takes_candidates_only(seed):
    found = calibration(seed)
    scores = group_mean(found, found.adjacent)
    threshold = float(np.quantile(scores, 0.5))
    for budget in range(1, LAYERS):
        expected = best(scores, budget, 2, threshold)
        if expected is None:
            with pytest.raises(ClpError, match=f"no {budget} layers of {LAYERS} have scores of"):
                make_plan(found, {"vlm": budget}, threshold)
        else:
            assert make_plan(found, {"vlm": budget}, threshold).removal["expert"] == expected


def test_a_group_without_a_budget_keeps_its_layers():
    modules = {
        "llm": {"layers": 6, "group": "llm", "period": 1, "dead_last": False},
        "dit": {"layers": 8, "group": "dit", "period": 2, "dead_last": False},
    }
    found = calibration(modules=modules)
    removal = make_plan(found, {"llm": 3}).removal
    assert len(removal["llm"]) == 3
    assert removal["dit"] == ()
    assert make_plan(found).removal == {"llm": (), "dit": ()}
    report = make_plan(found, {"llm": 3, "dit": 2}).report()
    assert report["dit"]["group"] == "dit"
    assert report["llm"]["removed"] == removal["llm"]


def test_unknown_criteria_and_seeds_are_told():
    with pytest.raises(ClpError, match=r"unknown criterion 'ckq' \(hint: did you mean 'cka'\?\)"):
        make_plan(calibration(), {"vlm": 2}, criterion="ckq")
    with pytest.raises(ClpError, match="the seed is -1"):
        make_plan(calibration(), {"vlm": 2}, criterion="random", seed=-1)


def test_by_default_the_papers_share_goes(tiny_checkpoint, tiny_calibration):
    found = Calibration.load(tiny_calibration)
    plan = default_plan(found, Checkpoint.open(tiny_checkpoint))
    assert plan.removal == make_plan(found, {"vlm": 6}).removal
    assert len(plan.removal["expert"]) == 6
    assert plan.notes == ()


def test_a_calibration_of_another_checkpoint_is_refused(tiny_checkpoint, tiny_calibration):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    check_calibration(Calibration.load(tiny_calibration), checkpoint)
    with pytest.raises(ClpError, match=r"of another checkpoint \(there\)"):
        check_calibration(calibration(), checkpoint)


def test_budgets_and_removals_are_read():
    assert parse_budgets(["vlm=6", "dit=0"]) == {"vlm": 6, "dit": 0}
    assert parse_removals(["vlm=1,2", "dit=3, 4"]) == {"vlm": (1, 2), "dit": (3, 4)}
    for wrong in ("vlm", "=3", "vlm=", "vlm=-1", "vlm=2.5", "vlm=x", "vlm=1,2"):
        with pytest.raises(ClpError, match="is not MODULE=K"):
            parse_budgets([wrong])
    for wrong in ("vlm", "=3", "vlm=", "vlm=1,,2", "vlm=-1", "vlm=a", "vlm=1;2"):
        with pytest.raises(ClpError, match="is not MODULE=1,2,5"):
            parse_removals([wrong])
    with pytest.raises(ClpError, match="once for each module"):
        parse_budgets(["vlm=1", "vlm=2"])
    with pytest.raises(ClpError, match="once for each module"):
        parse_removals(["vlm=1", "vlm=2"])


@pytest.mark.parametrize(
    ("layers", "period", "fixed", "budget"), [(12, 4, (11,), 4), (12, 4, (), 7), (9, 2, (8, 6), 4)]
)
def test_a_share_that_cannot_go_becomes_the_nearest_smaller_that_can(
    tiny_checkpoint, layers: int, period: int, fixed: tuple[int, ...], budget: int
):
    module = LayerStack(
        "dit", "dit", layers, "{layer}.", "layers", pattern_period=period, protected_layers=frozenset(fixed)
    )
    source = Checkpoint.open(tiny_checkpoint)
    family = dataclasses.replace(source.family, layer_stacks=lambda _: (module,), default_ratio={"dit": 7.5 / layers})
    checkpoint = dataclasses.replace(source, family=family, layer_stacks=(module,))
    meta = {"layers": layers, "group": "dit", "period": period, "dead_last": False, "fixed": list(fixed)}
    found = calibration(modules={"dit": meta})
    plan = default_plan(found, checkpoint)
    removed = plan.removal["dit"]
    assert len(removed) == budget
    assert removed in list(allowed(layers, budget, period))
    assert not set(fixed) & set(removed)
    share = family.default_budget({})["dit"]
    assert bool(plan.notes) == (share != budget)
    if plan.notes:
        assert plan.notes == (
            f"dit: {budget} layers are removed, because the paper's {share} do not fit its structure",
        )
        with pytest.raises(ClpError, match=rf"no {share} layers of {layers} .* \(hint: use a budget of {budget}"):
            make_plan(found, {"dit": share})


def test_so_many_layers_are_left_as_have_to_be(tiny_checkpoint):
    meta = {"layers": 6, "group": "llm", "period": 1, "dead_last": False, "fixed": [0, 1], "least": 4}
    module = LayerStack("llm", "llm", 6, "{layer}.", "layers", protected_layers=frozenset({0, 1}), min_layers=4)
    source = Checkpoint.open(tiny_checkpoint)
    family = dataclasses.replace(source.family, layer_stacks=lambda _: (module,), default_ratio={"llm": 0.9})
    checkpoint = dataclasses.replace(source, family=family, layer_stacks=(module,))
    found = calibration(modules={"llm": meta})
    assert len(default_plan(found, checkpoint).removal["llm"]) == 2
    assert len(make_plan(found, threshold=-1.0).removal["llm"]) == 2


def test_layers_that_have_to_stay_do_not_go():
    modules = {
        "llm": {"layers": 10, "group": "llm", "period": 1, "dead_last": False, "fixed": [1, 2, 3]},
        "dit": {"layers": 8, "group": "dit", "period": 4, "dead_last": False, "fixed": []},
    }
    for seed in range(20):
        found = calibration(seed, modules=modules)
        for budget in range(1, 7):
            scores = found.adjacent["llm"]
            sets = [s for s in allowed(10, budget, 1) if not {1, 2, 3} & set(s)]
            plan = make_plan(found, {"llm": budget, "dit": 4})
            assert plan.removal["llm"] == max(sets, key=lambda s: sum(scores[i - 1] for i in s))
            assert plan.removal["dit"] in list(allowed(8, 4, 4))
        assert not {1, 2, 3} & set(make_plan(found, threshold=0.0).removal["llm"])
        with pytest.raises(ClpError, match=r"the protected \(1, 2, 3\) \(hint: use a budget of 6\)$"):
            make_plan(found, {"llm": 7})
