# SPDX-License-Identifier: Apache-2.0
"""Real-time chunking against lerobot's own functions."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    NormalizerProcessorStep,
    RelativeActionsProcessorStep,
    UnnormalizerProcessorStep,
)

from clp_ros.core.compat.lerobot import relative_mask
from clp_ros.core.errors import ClpError
from clp_ros.policies.loading import load_policy
from clp_ros.policies.rtc import MARGIN_STEPS, supports_rtc

pytestmark = pytest.mark.usefixtures("one_thread")
CHUNK, STATE_SIZE = 50, 14


@pytest.fixture
def policy(tiny_checkpoint):
    return load_policy(tiny_checkpoint, "cpu")


@pytest.fixture
def sample(policy):
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for key in policy.image_features}
    state = rng.normal(size=STATE_SIZE).astype(np.float32)
    return {"images": images, "state": state, "task": "fold", "noise": torch.randn(1, CHUNK, 32)}


def spied(policy):
    """What lerobot's policy is given, a dict a chunk, and the execution horizon with it."""
    given, predict = [], policy.policy.predict_action_chunk

    def spy(batch, **options):
        given.append(options | {"horizon": policy.policy.config.rtc_config.execution_horizon})
        return predict(batch, **options)

    policy.policy.predict_action_chunk = spy
    return given


@pytest.mark.parametrize("delay", [0, 5, 10, 20, 39])
def test_the_first_step_that_can_be_changed_is_guided_whatever_the_delay(policy, sample, delay):
    given = spied(policy)
    policy.enable_rtc(horizon=10)
    policy.predict_chunk(**sample)
    policy.predict_chunk(**sample, elapsed_steps=4, delay_steps=delay)
    assert "prev_chunk_left_over" not in given[0]
    options = given[1]
    assert options["horizon"] == min(max(10, delay + MARGIN_STEPS), CHUNK - 4)
    assert options["prev_chunk_left_over"].shape[1] == options["horizon"]
    weights = RTCProcessor(policy.policy.config.rtc_config).get_prefix_weights(
        options["inference_delay"], options["horizon"], CHUNK
    )
    assert (weights[:delay] == 1).all()
    assert weights[delay] > 0.8
    assert (weights[options["horizon"] :] == 0).all()


def test_nothing_is_continued_where_nothing_is_left(policy, sample):
    given = spied(policy)
    policy.enable_rtc(horizon=10)
    policy.predict_chunk(**sample, elapsed_steps=0)  # there is no last chunk
    policy.predict_chunk(**sample, elapsed_steps=CHUNK)
    assert all("prev_chunk_left_over" not in options for options in given)


def relative(policy):
    """Makes a policy's actions relative to the state, but for the grippers', as lerobot's relative-action policies."""
    names = [f"joint_{i}" if i % 7 != 6 else f"gripper_{i}" for i in range(STATE_SIZE)]
    step = RelativeActionsProcessorStep(enabled=True, exclude_joints=["gripper"], action_names=names)
    steps = policy.preprocessor.steps
    at = next(i for i, one in enumerate(steps) if isinstance(one, NormalizerProcessorStep))
    steps.insert(at, step)
    after = policy.postprocessor.steps
    at = next(i for i, one in enumerate(after) if isinstance(one, UnnormalizerProcessorStep))
    after.insert(at + 1, AbsoluteActionsProcessorStep(enabled=True, relative_step=step))
    return step


def test_what_is_left_of_a_relative_chunk_is_relative_to_the_new_state(policy, sample):
    step = relative(policy)
    given = spied(policy)
    policy.enable_rtc(horizon=20)
    first = policy.predict_chunk(**sample)
    moved = sample | {"state": sample["state"] + np.linspace(-0.5, 0.5, STATE_SIZE, dtype=np.float32)}
    second = policy.predict_chunk(**moved, elapsed_steps=10, delay_steps=8)
    left = given[1]["prev_chunk_left_over"]
    normalizer = next(one for one in policy.preprocessor.steps if isinstance(one, NormalizerProcessorStep))
    try:
        from lerobot.policies.rtc import reanchor_relative_rtc_prefix
    except ImportError:  # lerobot 0.5.1 has none
        mean, std = (normalizer.state_dict()[f"action.{key}"].numpy() for key in ("mean", "std"))
        offset = moved["state"] * np.array(relative_mask(step, STATE_SIZE))
        wanted = torch.from_numpy((first[10:30] - offset - mean) / (std + normalizer.eps))
    else:
        wanted = reanchor_relative_rtc_prefix(
            torch.from_numpy(first[10:30]), torch.from_numpy(moved["state"]), step, normalizer, "cpu"
        )
    torch.testing.assert_close(left[0], wanted, rtol=1e-5, atol=1e-5)
    # The robot goes on where it was going, in its own coordinates: not off by as much as it has moved.
    apart = policy.predict_chunk(**moved)
    kept = np.abs(second[:8] - first[10:18]).mean()
    assert kept < 0.3 * np.abs(apart[:8] - first[10:18]).mean()


def test_support_is_what_lerobot_says(policy):
    assert supports_rtc(policy.policy)
    try:
        from lerobot.rollout.inference.rtc import supports_rtc_inference
    except ImportError:
        pytest.skip("lerobot 0.5.1 has no such question")
    chunk = SimpleNamespace(predict_action_chunk=policy.policy.predict_action_chunk)
    for one in (
        policy.policy,
        SimpleNamespace(supports_rtc=lambda: False, **vars(chunk)),
        SimpleNamespace(supports_rtc=lambda: True, predict_action_chunk=lambda batch: batch),
        SimpleNamespace(supports_rtc=lambda: True, **vars(chunk)),
    ):
        assert supports_rtc(one) == supports_rtc_inference(one)


def test_what_lerobot_has_not_is_refused(policy):
    class Plain(torch.nn.Module):
        config = SimpleNamespace()

        def supports_rtc(self):
            return True

        def predict_action_chunk(self, batch, **options): ...

    class Without(Plain):
        def supports_rtc(self):
            return False

    with pytest.raises(
        ClpError, match=r": lerobot has no real-time chunking for smolvla \(hint: use mode replace or ensemble\)"
    ):
        dataclasses.replace(policy, policy=Without()).enable_rtc(10)
    # GR00T N1.7 has its own way, which leaves relative actions unguided.
    bare = Plain()
    bare.config = SimpleNamespace(use_relative_actions=True)
    with pytest.raises(ClpError, match="for smolvla with relative actions"):
        dataclasses.replace(policy, policy=bare).enable_rtc(10)
