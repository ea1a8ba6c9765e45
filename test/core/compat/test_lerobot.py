# SPDX-License-Identifier: Apache-2.0
"""LeRobot's private names, and names that clp_ros replaces for a while: a new LeRobot that changes one fails here."""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    RelativeActionsProcessorStep,
    TransitionKey,
    create_transition,
)
from torch import nn

from clp_ros.core.compat import lerobot as compat
from lerobot_policy_clp import compat as plugin_compat

pytestmark = pytest.mark.lerobot

needs_n1_5 = pytest.mark.skipif(not find_spec("lerobot.policies.groot.groot_n1"), reason="lerobot 0.5 only")
needs_n1_7 = pytest.mark.skipif(not find_spec("lerobot.policies.groot.groot_n1_7"), reason="lerobot 0.6 only")


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_relative_actions_are_linked_and_their_mask_and_state_are_read():
    relative = RelativeActionsProcessorStep(
        enabled=True, exclude_joints=["gripper"], action_names=["shoulder", "gripper.pos", "wrist"]
    )
    absolute = AbsoluteActionsProcessorStep(enabled=True)
    compat.link_relative_actions(SimpleNamespace(steps=[relative]), SimpleNamespace(steps=[absolute]))
    assert absolute.relative_step is relative
    assert compat.relative_mask(relative, 3) == [True, False, True]
    state = torch.tensor([[1.0, 2.0, 3.0]])
    relative(create_transition(observation={"observation.state": state}, action=torch.zeros(1, 5, 3)))
    assert torch.equal(compat.relative_state(relative), state)
    given = create_transition(action=torch.zeros(1, 5, 3))
    assert torch.equal(absolute(given)[TransitionKey.ACTION][0, 4], torch.tensor([1.0, 0.0, 3.0]))


@needs_n1_7
def test_groot_n1_7_steps_are_linked():
    from lerobot.policies.groot.processor_groot import GrootN17ActionDecodeStep, GrootN17PackInputsStep

    pack, decode = (cls.__new__(cls) for cls in (GrootN17PackInputsStep, GrootN17ActionDecodeStep))
    decode.pack_step = None
    compat.link_groot_n1_7_steps(SimpleNamespace(steps=[pack]), SimpleNamespace(steps=[decode]))
    assert decode.pack_step is pack


def test_a_groot_policy_holds_the_model_that_an_overridden_method_makes(monkeypatch):
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    model = nn.Linear(1, 1)
    monkeypatch.setattr(GrootPolicy, "_create_groot_model", lambda self: model)
    config = GrootConfig(device="cpu")
    monkeypatch.setattr(GrootConfig, "validate_features", lambda self: None)
    policy = GrootPolicy(config)
    assert compat.groot_model(policy) is model
    assert f"{compat.GROOT_MODEL}.weight" in policy.state_dict()


def test_weights_are_put_into_a_policy_by_an_overridden_method():
    load = inspect.getattr_static(PreTrainedPolicy, "_load_as_safetensor")
    assert isinstance(load, classmethod)
    assert parameters(load.__func__) == ["cls", "model", "model_file", "map_location", "strict"]
    assert "cls._load_as_safetensor(" in inspect.getsource(PreTrainedPolicy.from_pretrained)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_gemma_names(name):
    modeling = import_module(f"lerobot.policies.{name}.modeling_{name}")
    policy_class = modeling.PI0Policy if name == "pi0" else modeling.PI05Policy
    policy = policy_class.__new__(policy_class)
    nn.Module.__init__(policy)
    policy.config = SimpleNamespace()
    policy.model = SimpleNamespace(state_dict=dict)
    stored = "time_mlp_in.bias" if name == "pi0" else "action_time_mlp_in.bias"
    wanted = "action_time_mlp_in.bias" if name == "pi0" else "time_mlp_in.bias"
    assert list(plugin_compat.gemma_names(policy, {stored: torch.zeros(2)})) == [wanted]


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_what_is_replaced_in_pi0_is_there(name):
    modeling = import_module(f"lerobot.policies.{name}.modeling_{name}")
    sizes = modeling.get_gemma_config("gemma_300m")
    assert {"depth", "width", "mlp_dim", "head_dim"} <= vars(sizes).keys()
    assert parameters(modeling.get_gemma_config) == ["variant"]
    constructor = inspect.getsource(modeling.PaliGemmaWithExpertModel.__init__)
    for built in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
        assert f"{built}(config=" in constructor
    model = modeling.PI0Pytorch if name == "pi0" else modeling.PI05Pytorch
    assert parameters(model.sample_noise) == ["self", "shape", "device"]
    assert parameters(model.sample_time) == ["self", "bsize", "device"]
    forward = inspect.getsource(model.forward)
    assert all(f"self.{part}(" in forward for part in ("embed_prefix", "embed_suffix"))
    assert hasattr(import_module(f"lerobot.policies.{name}.processor_{name}"), "TokenizerProcessorStep")


def test_what_is_replaced_in_smolvla_is_there():
    from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching

    assert "self.embed_prefix(" in inspect.getsource(VLAFlowMatching.forward)


@needs_n1_5
def test_what_is_replaced_and_given_in_groot_n1_5_is_there():
    from lerobot.policies.groot.action_head.flow_matching_action_head import FlowmatchingActionHead

    assert parameters(FlowmatchingActionHead.sample_time) == ["self", "batch_size", "device", "dtype"]
    config = plugin_compat.eagle_config({"text_config": {"architectures": ["Qwen3ForCausalLM"]}}, attention="sdpa")
    assert config._attn_implementation == "sdpa"


@needs_n1_7
def test_what_is_replaced_and_overridden_in_groot_n1_7_is_there(monkeypatch):
    from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, Qwen3Backbone

    assert parameters(GR00TN17ActionHead.sample_time) == ["self", "batch_size", "device", "dtype"]

    class Reached(Exception):
        pass

    def build(self, *, model_name, model_kwargs, config_kwargs):
        raise Reached

    monkeypatch.setattr(Qwen3Backbone, "_from_backbone_config", build)
    with pytest.raises(Reached):
        Qwen3Backbone(load_pretrained_weights=False)


@needs_n1_7
def test_the_published_backbone_of_groot_n1_7_and_its_tied_head():
    config = plugin_compat.cosmos_reason2_config()
    assert (config.model_type, config.text_config.hidden_size, config.text_config.num_hidden_layers) == (
        "qwen3_vl",
        2048,
        28,
    )
    backbone = nn.Module()
    backbone.embedding, backbone.lm_head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    backbone.get_input_embeddings = lambda: backbone.embedding
    plugin_compat.tie_lm_head(backbone)
    assert backbone.lm_head.weight is backbone.embedding.weight
