# SPDX-License-Identifier: Apache-2.0
"""Every removal of two layers, for every family: refused, or the model without the layers, bit for bit."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import remove_in_memory

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.registry import families
from clp_ros.pruning.surgery import plan_surgery, prune_checkpoint


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models are slower on several threads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _groups(modules: tuple[LayerStack, ...]) -> dict[str, list[LayerStack]]:
    groups: dict[str, list[LayerStack]] = {}
    for module in modules:
        groups.setdefault(module.group, []).append(module)
    return groups


def _observation(policy: LeRobotPolicy) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {key: (*feature.shape[1:], 3) for key, feature in policy.policy.config.image_features.items()}
    return {
        "images": {key: rng.integers(0, 256, shape, dtype=np.uint8) for key, shape in shapes.items()},
        "state": rng.standard_normal(policy.state_size).astype(np.float32),
        "task": "pick it up",
    }


def _chunk(policy: LeRobotPolicy, observation: Mapping[str, Any]) -> np.ndarray:
    torch.manual_seed(0)  # the flow's noise
    return policy.predict_chunk(**observation)


def _fits(module: LayerStack, removed: tuple[int, ...]) -> bool:
    """Whether a shallower model has layers of the same kinds in the places of those that stay (facts of the family)."""
    kept = [layer for layer in range(module.layers) if layer not in removed]
    alternates = all(layer % module.pattern_period == place % module.pattern_period for place, layer in enumerate(kept))
    return alternates and module.protected_layers.isdisjoint(removed)


@pytest.mark.parametrize("name", families())
def test_every_pair_of_layers_is_refused_or_gone(
    name: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = family_checkpoint(name)
    whole = load_policy(source, "cpu")
    observation = _observation(whole)
    before = _chunk(whole, observation)
    for group, members in _groups(whole.layer_stacks).items():
        gone = 0
        for pair in combinations(range(members[0].layers), 2):
            output = tmp_path / f"{group}_{pair}"
            if not all(_fits(module, pair) for module in members):
                with pytest.raises(ClpError):
                    prune_checkpoint(source, output, {members[-1].name: pair})
                assert not output.exists()
                continue
            prune_checkpoint(source, output, {members[-1].name: pair})
            removal = {module.name: pair for module in members}
            pruned = load_policy(output, "cpu")
            without = replace(whole, policy=remove_in_memory(whole.policy, whole.layer_stacks, removal))
            chunk = _chunk(pruned, observation)
            shutil.rmtree(output)  # not before: some processors read their files when they are first used
            np.testing.assert_array_equal(chunk, _chunk(without, observation), f"{group} without {pair}")
            assert not np.array_equal(chunk, before)  # the layers did something, so the comparison can tell
            gone += 1
        assert gone


@pytest.mark.parametrize("name", families())
def test_coupled_modules_lose_the_same_layers_or_none(name: str, family_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(family_checkpoint(name))
    for members in _groups(checkpoint.layer_stacks).values():
        for one, other in combinations(members, 2):
            pairs = list(combinations(range(0, one.layers, 3), 2))
            for first, second in product(pairs, pairs):
                if first != second:
                    with pytest.raises(ClpError, match="must lose the same layers"):
                        plan_surgery(checkpoint, {one.name: first, other.name: second})
