# SPDX-License-Identifier: Apache-2.0
"""Calibration, from bags to its folder, of a policy that LeRobot does not run."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, override

import numpy as np
import pytest
import torch
from torch import nn

from clp_ros.bags.reader import open_bag
from clp_ros.calibration.calibrate import calibrate_bags
from clp_ros.calibration.calibration_file import Calibration
from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.datasets.episodes import read_frames, usable_ticks
from clp_ros.evaluation.flops import count_gflops
from clp_ros.policies.base import HiddenStates, Modality, Policy, token_modalities
from clp_ros.policies.compilation import compile_policy
from clp_ros.policies.hidden_state_hooks import recorded_states
from clp_ros.robots.embodiment import load_embodiment

EMBODIMENT = load_embodiment("aloha_bimanual")
LAYERS, WIDTH, CHUNK = 4, 24, 20
STACK = LayerStack("blocks", "blocks", LAYERS, "blocks.{layer}.", "blocks", probe=None)


class Block(nn.Module):
    """A layer that adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.inner(hidden))


class Network(nn.Module):
    """One token a camera, one for the state, one a step."""

    def __init__(self, joints: int) -> None:
        super().__init__()
        self.pixels, self.joints = nn.Linear(3, WIDTH), nn.Linear(joints, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, joints)

    def forward(self, images: torch.Tensor, state: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat((self.pixels(images), self.joints(state)[:, None], self.joints(actions)), dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden[:, -CHUNK:])


class TorchPolicy(Policy):
    """Gives the abstract members and nothing else."""

    device = "cpu"
    family_name = "pure_torch"
    layer_stacks = (STACK,)
    camera_sizes: Mapping[str, tuple[int, int]] = {camera.feature: (48, 64) for camera in EMBODIMENT.cameras.values()}
    state_size = action_size = EMBODIMENT.action_size
    chunk_size = CHUNK
    path = Path("/no/such/checkpoint")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._network = Network(self.state_size)

    @property
    @override
    def model(self) -> nn.Module:
        return self._network

    @override
    def fingerprint(self) -> str:
        return "0" * 64

    @override
    def batch(
        self, images: Any, state: Any, task: str, actions: Any = None, action_is_pad: Any = None
    ) -> dict[str, torch.Tensor]:
        means = [np.asarray(images[name], dtype=np.float32).mean(axis=(0, 1)) / 255 for name in self.cameras]
        given = np.zeros((CHUNK, self.action_size)) if actions is None else actions
        padded = np.zeros(CHUNK, dtype=bool) if action_is_pad is None else action_is_pad
        return {
            "images": torch.from_numpy(np.stack(means))[None],
            "state": torch.tensor(np.asarray(state), dtype=torch.float32)[None],
            "actions": torch.tensor(np.asarray(given), dtype=torch.float32)[None],
            "padded": torch.from_numpy(padded)[None],
        }

    @override
    def predict_batch(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(batch["images"], batch["state"], batch["actions"])

    @override
    def predict_chunk(self, images: Any, state: Any, task: str, **_: Any) -> np.ndarray:
        with torch.inference_mode():
            return self.predict_batch(self.batch(images, state, task))[0].numpy()

    @override
    def hidden_states(self, batch: dict[str, torch.Tensor], rng: np.random.Generator) -> dict[str, HiddenStates]:
        noise = torch.from_numpy(rng.standard_normal(batch["actions"].shape, dtype=np.float32))
        with torch.inference_mode(), recorded_states(self.model, self.layer_stacks) as states:
            self.predict_batch(batch | {"actions": batch["actions"] + noise})
        others = torch.ones(1, len(self.cameras) + 1, dtype=torch.bool)
        runs = (Modality.IMAGE, len(self.cameras)), (Modality.STATE, 1), (Modality.ACTION, None)
        mask = torch.cat((others, ~batch["padded"]), dim=1)
        return {"blocks": HiddenStates(states["blocks"], token_modalities(mask, *runs))}


@pytest.fixture(scope="module")
def policy() -> TorchPolicy:
    return TorchPolicy()


def test_a_bag_is_calibrated_on(policy: TorchPolicy, recording: Path, tmp_path: Path) -> None:
    calibration = calibrate_bags(policy, [recording], EMBODIMENT, "Fold the shorts.", samples=6)
    # The same with another library's arithmetic: every frame's tokens together, in float64.
    ticks = usable_ticks(open_bag(recording), EMBODIMENT).usable
    drawn = np.sort(np.random.default_rng(0).choice(len(ticks), 6, replace=False))
    tokens: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
    for index, frame in enumerate(read_frames(open_bag(recording), EMBODIMENT, ticks[drawn].tolist(), CHUNK)):
        seen = frame.observation
        batch = policy.batch(seen.images, seen.state, "", frame.actions, frame.action_is_pad)
        one = policy.hidden_states(batch, np.random.default_rng([0, index]))["blocks"]
        for layer, states in zip(tokens, one.layers, strict=True):
            layer.append(states[one.mask].double().numpy())
    stacked = [np.concatenate(layer) for layer in tokens]
    centred = [layer - layer.mean(axis=0) for layer in stacked]
    for x, (one_layer, other) in enumerate(pairwise(centred)):
        expected = np.sum((other.T @ one_layer) ** 2)
        expected /= np.linalg.norm(one_layer.T @ one_layer) * np.linalg.norm(other.T @ other)
        assert calibration.matrices["blocks"][x, x + 1] == pytest.approx(expected, abs=1e-6)
    assert calibration.meta["family"] == "pure_torch"
    assert calibration.meta["checkpoint"] == {"path": str(policy.path), "fingerprint": policy.fingerprint()}
    assert calibration.meta["tokens"] == {"blocks": len(stacked[0])}
    assert calibration.meta["modules"]["blocks"]["layers"] == LAYERS
    assert calibration.meta["statistics"] == {"source": "checkpoint"}
    assert calibration.meta["dtype"] == "float32"
    calibration.save(tmp_path)
    np.testing.assert_array_equal(Calibration.load(tmp_path).matrices["blocks"], calibration.matrices["blocks"])


def test_what_a_policy_cannot_do_is_refused_with_a_reason(policy: TorchPolicy, recording: Path) -> None:
    with pytest.raises(ClpError, match="takes no statistics"):
        calibrate_bags(policy, [recording], EMBODIMENT, "x", samples=1, statistics="bags")
    with pytest.raises(ClpError, match=r"the policy's cameras are .* has none"):
        policy.check_features([], 14, "my robot")
    with pytest.raises(ClpError, match="my robot has 13 joints"):
        policy.check_features(list(policy.camera_sizes), 13, "my robot")
    with pytest.raises(ClpError, match="no real-time chunking"):
        policy.enable_rtc(10)
    with pytest.raises(ClpError, match="no training step"):
        policy.make_optimizer()
    with pytest.raises(ClpError, match="no denoising step"):
        compile_policy(policy, "x")


def test_the_defaults_fit_a_policy_that_gives_the_abstract_members_only(policy: TorchPolicy) -> None:
    assert policy.cameras == tuple(policy.camera_sizes)
    assert policy.left_out_cameras == ()
    assert policy.has_statistics
    policy.check_normalised()
    policy.warm_up()
    # Two products a weight and token.
    inputs = len(policy.cameras) * 3 * WIDTH + (CHUNK + 1) * policy.state_size * WIDTH
    tokens = len(policy.cameras) + 1 + CHUNK
    products = inputs + tokens * LAYERS * WIDTH**2 + CHUNK * WIDTH * policy.action_size
    assert count_gflops(policy) * 1e9 == pytest.approx(2 * products)


def test_a_policy_without_an_abstract_member_is_none() -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Partly", (Policy,), {"device": "cpu"})()
