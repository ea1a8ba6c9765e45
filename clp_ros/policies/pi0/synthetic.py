# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of π0 and π0.5, made with the real classes and without a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.policies.empty_weights import empty_weights
from clp_ros.policies.family import Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.patched import patched
from clp_ros.policies.pi0.family import EMBEDDING, LM_HEAD, TOKENIZER_FOLDER
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.random_weights import byte_level_tokenizer, draw_tensor, projection_gains, write_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

# The output projections: a layer adds their products to its input.
_OUTPUT_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


# Config fields of a random checkpoint. The widths of the two towers differ from each other and from their heads'.
_SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 8,
        "vlm_width": 64,
        "vlm_mlp_dim": 160,
        "expert_width": 48,
        "expert_mlp_dim": 96,
        "head_dim": 16,
        "vocab_size": 320,
        "vision_layers": 2,
        "vision_width": 32,
        "vision_mlp_dim": 80,
        "vision_heads": 2,
        "image_resolution": (56, 56),
        "num_inference_steps": 2,
    },
    # As in fine-tuning of the released models: bfloat16, with a frozen vision tower.
    "full": {"dtype": "bfloat16", "freeze_vision_encoder": True},
}


def make_checkpoint(family: Family, size_name: str, folder: Path, features: PolicyFeatures, seed: int) -> None:
    """Writes a random checkpoint; see :attr:`clp_ros.policies.family.Family.synthetic`."""
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    name, size = family.name, _SIZES[size_name]
    policy_type = name
    if "num_layers" in size:
        policy_type = f"clp_{name}"
        register_plugin()
    byte_level_tokenizer({}).save_pretrained(folder / TOKENIZER_FOLDER)
    usual = make_policy_config(name)  # pads state and action to 32 components; a robot may have more joints
    inputs, outputs = features.lerobot_features()
    config = make_policy_config(
        policy_type,
        max_state_dim=max(usual.max_state_dim, features.state_size),
        max_action_dim=max(usual.max_action_dim, features.action_size),
        input_features=inputs,
        output_features=outputs,
        device="cpu",
        push_to_hub=False,
        **size,
    )
    with empty_weights():
        policy = get_policy_class(policy_type)(config)
    config.save_pretrained(folder)
    gains = projection_gains(family.layer_stacks({"type": policy_type, **size}), _OUTPUT_PROJECTIONS, seed)
    write_weights(policy, folder / "model.safetensors", partial(_fill, policy, gains, seed))

    # lerobot's processors would download their tokenizer from the Hub.
    processors = import_module(f"lerobot.policies.{name}.processor_{name}")
    tokenize = partial(_tokenizer_step, processors.TokenizerProcessorStep, folder / TOKENIZER_FOLDER)
    with patched(processors, TokenizerProcessorStep=tokenize):
        for processor in make_pre_post_processors(config, dataset_stats=features.lerobot_statistics()):
            processor.save_pretrained(folder)


def _tokenizer_step(step: Any, tokenizer: Path, **settings: Any) -> Any:
    return step(**(settings | {"tokenizer_name": str(tokenizer)}))


def _fill(policy: nn.Module, gains: Mapping[str, float], seed: int, name: str, tensor: torch.Tensor) -> None:
    if name == LM_HEAD:
        name = EMBEDDING  # tied in the published model
    draw_tensor(policy, gains, seed, name, tensor)
    owner, _, attribute = name.rpartition(".")
    if attribute == "weight" and type(policy.get_submodule(owner)).__name__ == "PiGemmaRMSNorm":
        tensor.zero_()  # Gemma's norms multiply by 1 + weight
