# SPDX-License-Identifier: Apache-2.0
"""What each token stands for: held against which tokens change when one input of the policy changes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from clp_ros.policies.base import HiddenStates, Modality, Policy, token_modalities
from clp_ros.policies.loading import load_policy
from clp_ros.policies.registry import built_in_families

pytestmark = pytest.mark.lerobot

WORDS = "Fold the shorts."
# Tokens of the tiny checkpoints for two cameras, but those of the words: by stack.
CAMERAS = 2
PIXELS = {"smolvla": 4, "pi0": 16, "pi05": 16, "groot": 16, "groot_n1_7": 4}  # tokens of one camera
SUFFIX = {
    "smolvla": {Modality.ACTION: 50},
    "pi0": {Modality.STATE: 1, Modality.ACTION: 50},
    "pi05": {Modality.ACTION: 50},
    "groot": {Modality.STATE: 1, Modality.LEARNED: 32, Modality.ACTION: 16},
    "groot_n1_7": {Modality.STATE: 1, Modality.ACTION: 16},
}


@pytest.fixture(scope="module", params=list(built_in_families()))
def policy(request: pytest.FixtureRequest, family_checkpoint: Any, one_thread: None) -> Policy:
    return load_policy(family_checkpoint(request.param), "cpu")


@pytest.fixture(scope="module")
def sample(policy: Policy) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "images": {name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in policy.cameras},
        "state": rng.uniform(-0.5, 0.5, policy.state_size).astype(np.float32),
        "task": WORDS,
        "actions": rng.uniform(-0.5, 0.5, (policy.chunk_size, policy.action_size)).astype(np.float32),
        "action_is_pad": np.zeros(policy.chunk_size, dtype=bool),
    }


def first_inputs(policy: Policy, sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, HiddenStates]]:
    """What the first layer of every stack takes in, at the same noise and time whatever the sample."""
    taken: dict[str, torch.Tensor] = {}
    handles = []
    for stack in policy.layer_stacks:
        first = policy.model.get_submodule(stack.layers_path)[0]
        probe = first if stack.probe is None else first.get_submodule(stack.probe)

        def keep(_: Any, args: Any, kwargs: Any, name: str = stack.name) -> None:
            taken[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        handles.append(probe.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        states = policy.hidden_states(policy.batch(**sample), np.random.default_rng(0))
    finally:
        for handle in handles:
            handle.remove()
    return taken, states


@pytest.fixture(scope="module")
def found(policy: Policy, sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, HiddenStates]]:
    return first_inputs(policy, sample)


def labels(states: dict[str, HiddenStates], name: str) -> list[Modality]:
    return [Modality(value) for value in states[name].modalities[0].tolist()]


def prefix_and_suffix(policy: Policy) -> tuple[str, str]:
    return policy.layer_stacks[0].name, policy.layer_stacks[-1].name


def test_every_token_has_a_label(policy: Policy, found: Any) -> None:
    _, states = found
    assert list(states) == [stack.name for stack in policy.layer_stacks]
    for one in states.values():
        assert one.modalities.dtype == torch.int8
        assert {one.modalities.shape} == {layer.shape[:2] for layer in one.layers}
        assert torch.equal(one.mask, one.modalities != 0)


def test_token_counts_are_those_of_the_graph(policy: Policy, found: Any) -> None:
    _, states = found
    prefix, suffix = prefix_and_suffix(policy)
    counts = Counter(labels(states, prefix))
    assert counts[Modality.IMAGE] == CAMERAS * PIXELS[policy.family_name]
    assert counts[Modality.STATE] == (policy.family_name == "smolvla")
    assert counts[Modality.LANGUAGE] >= len(WORDS)  # byte by byte, and what the family puts around them
    assert counts[Modality.ACTION] == counts[Modality.LEARNED] == 0
    assert Counter(labels(states, suffix)) == SUFFIX[policy.family_name]
    if len(states) == 3:  # the middle one goes over what the language model puts out
        assert torch.equal(states["vl_self_attention"].modalities, states["llm"].modalities)


def changes() -> Iterator[tuple[str, Modality]]:
    yield from (("images", Modality.IMAGE), ("task", Modality.LANGUAGE))
    yield from (("state", Modality.STATE), ("actions", Modality.ACTION))


@pytest.mark.parametrize(("changed", "modality"), changes(), ids=lambda value: str(value))
def test_only_the_tokens_of_an_input_change_with_it(
    policy: Policy, sample: dict[str, Any], found: Any, changed: str, modality: Modality
) -> None:
    others = {
        "images": {name: 255 - image for name, image in sample["images"].items()},
        "task": "Hold the shirts.",  # as many bytes
        "state": -sample["state"],
        "actions": -sample["actions"],
    }
    before, states = found
    after, _ = first_inputs(policy, sample | {changed: others[changed]})
    if policy.family_name == "pi05" and changed == "state":
        modality = Modality.LANGUAGE  # it is written among the words
    seen = False
    for name in prefix_and_suffix(policy):
        given = torch.tensor(labels(states, name))
        moved = (before[name] != after[name]).any(dim=-1)[0]
        assert set(given[moved & (given != 0)].tolist()) <= {int(modality)}
        seen |= bool(moved.any())
        if modality != Modality.LANGUAGE:  # of the words, those around the instruction stay
            assert moved[given == modality].all()
    assert seen


def test_padding_is_labelled_so(policy: Policy, sample: dict[str, Any]) -> None:
    padded = sample["action_is_pad"].copy()
    padded[-3:] = True
    states = policy.hidden_states(policy.batch(**sample | {"action_is_pad": padded}), np.random.default_rng(0))
    _, suffix = prefix_and_suffix(policy)
    assert [label == Modality.PADDING for label in labels(states, suffix)][-3:] == [True] * 3
    assert Counter(labels(states, suffix))[Modality.ACTION] == SUFFIX[policy.family_name][Modality.ACTION] - 3


def test_runs_of_tokens() -> None:
    mask = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    found = token_modalities(mask, (Modality.IMAGE, 2), (Modality.LANGUAGE, None), (Modality.ACTION, 1))
    assert found.tolist() == [[1, 1, 0, 2, 4], [1, 0, 2, 2, 0]]


def test_smolvlas_prefix_may_be_padded_to_a_length(tiny_policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {name: np.zeros((48, 64, 3), dtype=np.uint8) for name in tiny_policy.cameras}
    actions = np.zeros((tiny_policy.chunk_size, tiny_policy.action_size))
    batch = tiny_policy.batch(images, np.zeros(tiny_policy.state_size), WORDS, actions)
    plain = labels(tiny_policy.hidden_states(batch, np.random.default_rng(0)), "vlm")
    monkeypatch.setattr(tiny_policy.model.model, "prefix_length", len(plain) + 5)
    padded = labels(tiny_policy.hidden_states(batch, np.random.default_rng(0)), "vlm")
    assert padded == plain + [Modality.PADDING] * 5
    assert plain[-1] == Modality.STATE
