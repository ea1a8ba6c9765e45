# SPDX-License-Identifier: Apache-2.0
"""Linear layers in bfloat16 where the CPU has no instructions for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hidden_state_tools import states_and_masks
from torch import nn

from clp_ros.policies import float32_products
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy


@pytest.fixture(params=[False, True], ids=["plain", "bfloat16"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU says that it multiplies bfloat16."""
    monkeypatch.setattr(float32_products, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_summed_exactly_and_rounded_once(multiplies: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 64, bias=bias).to(torch.bfloat16)
    states = torch.randn(3, 40, 512).to(torch.bfloat16)
    with torch.inference_mode(), float32_products.fast_products("cpu"):
        got = layer(states)
        named = nn.functional.linear(bias=layer.bias, weight=layer.weight, input=states)
    exact = states.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert got.dtype == torch.bfloat16
    assert torch.equal(named, got)
    # Half a unit in the last place, of eight bits, and what float32 sums lose.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_other_dtypes_and_functions_are_left_alone(multiplies: bool) -> None:
    torch.manual_seed(0)
    layer, states = nn.Linear(16, 16), torch.randn(5, 16)
    half = states.to(torch.bfloat16)
    expected = layer(states), half @ half.T, nn.functional.linear(states, weight=layer.weight)
    with float32_products.fast_products("cpu"):
        got = layer(states), half @ half.T, nn.functional.linear(states, weight=layer.weight)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def hidden(policy: LeRobotPolicy) -> dict[str, list[torch.Tensor]]:
    rng = np.random.default_rng(1)
    images = {key: rng.integers(0, 256, (48, 64, 3), np.uint8) for key in policy.policy.config.image_features}
    state, actions = rng.normal(size=policy.state_size), rng.normal(size=(policy.chunk_size, policy.action_size))
    batch = policy.batch(
        images, state.astype(np.float32), "fold", actions.astype(np.float32), np.zeros(policy.chunk_size, bool)
    )
    return states_and_masks(policy, batch, 2)[0]


def test_hidden_states_are_the_same_up_to_rounding(
    family_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(family_checkpoint("pi0"), "cpu")
    policy.policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")  # as the full size is stored
    both = []
    for can in (True, False):
        monkeypatch.setattr(float32_products, "multiplies_bfloat16", lambda can=can: can)
        both.append(hidden(policy))
    for name, layers in both[0].items():
        for one, other in zip(layers, both[1][name], strict=True):
            assert one.dtype == other.dtype
            distance = torch.linalg.vector_norm(one.double() - other.double()) / torch.linalg.vector_norm(one.double())
            assert distance < 2e-2, name
