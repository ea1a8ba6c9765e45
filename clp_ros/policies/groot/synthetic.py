# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of GR00T N1.5, made with the real classes and without a model hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clp_ros.core.files import rewrite_json
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.empty_weights import empty_weights
from clp_ros.policies.family import Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.random_weights import byte_level_tokenizer, draw_tensor, projection_gains, write_weights

# What a layer adds to its input goes through these: the last matrices of attention and feed-forward.
OUTPUT_PROJECTIONS = (
    *("self_attn.o_proj.weight", "mlp.down_proj.weight"),  # of the language model
    *("attn1.to_out.0.weight", "ff.net.2.weight"),  # of the other two stacks
)
# Layers with weights of each embodiment: their biases, and their weights, whose inputs are the last axis but one.
NAMES: Mapping[str, Any] = {"biases": (".bias", ".b"), "inputs_last_but_one": (".W",)}


@dataclass(frozen=True)
class _Size:
    """Config fields of a checkpoint made at random, and what its pictures become."""

    config: dict[str, Any]
    pixels: int
    patch: int = 14


_SIZES = {
    # All widths differ: the language model's (48) from its keys' (32) and from the diffusion transformer's (40), so
    # that a block that attends to the one has no place among those that attend to the other.
    "tiny": _Size(
        config={
            "llm_layers": 6,
            "vl_self_attention_layers": 4,
            "dit_layers": 8,
            "use_bf16": False,
            "dtype": "float32",
            "eagle_config": {
                "text_config": {
                    "hidden_size": 48,
                    "intermediate_size": 112,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "vocab_size": 320,
                    "max_position_embeddings": 4096,
                },
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 80,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 56,
                },
                "force_image_size": 56,
            },
            "action_head_config": {
                "backbone_embedding_dim": 48,
                "input_embedding_dim": 40,
                "hidden_size": 24,
                "max_seq_len": 32,
                "diffusion_model_cfg": {
                    "num_attention_heads": 4,
                    "attention_head_dim": 10,
                    "cross_attention_dim": 48,
                    "output_dim": 24,
                },
                "vl_self_attention_cfg": {"num_attention_heads": 3, "attention_head_dim": 16},
            },
        },
        pixels=56,
    ),
    "full": _Size(config={}, pixels=224),
}
# A picture's place, and what LeRobot puts around an instruction, are one token each: a byte-level tokenizer without
# merges has one a letter for all else. Up to nine cameras.
_SPECIAL_TOKENS = {
    "image_token": "<IMG_CONTEXT>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "task_start_token": "['",
    "task_end_token": "']",
    **{f"image_{number}_token": f"<image {number}>" for number in range(1, 10)},
}
# As many as with two pictures of 256 make the 552 tokens of the measurements (facts of the released model).
_TASK_TOKENS = 32
# Eagle's, of one message of images and text, without the words that say who speaks.
_CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for part in messages[0].content %}{% if part.type == 'image' %}"
    "{% set images.count = images.count + 1 %}<image-{{ images.count }}>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)


def _write_eagle(size: _Size, folder: Path) -> int:
    """Writes the settings of Eagle's tokenizer and processor; returns the id of the token that stands for a picture."""
    tokenizer = byte_level_tokenizer(_SPECIAL_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    images = {
        "size": {"height": size.pixels, "width": size.pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "do_resize": False,  # cutting it into tiles resizes it
        "do_pad": False,
    }
    texts = {"image_token": "<IMG_CONTEXT>", "tokens_per_tile": (size.pixels // size.patch) ** 2}
    for name, settings in (("preprocessor_config.json", images), ("processor_config.json", texts)):
        (folder / name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return tokenizer.image_token_id


def make_checkpoint(family: Family, size_name: str, folder: Path, features: PolicyFeatures, seed: int) -> None:
    """As :attr:`clp_ros.policies.family.Family.synthetic` says."""
    from tempfile import TemporaryDirectory

    register_plugin()
    from lerobot_policy_clp.configuration_clp_groot import ClpGrootConfig
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy
    from lerobot_policy_clp.processor_clp_groot import ClpGrootEagleStep, make_clp_groot_pre_post_processors

    size = _SIZES[size_name]
    inputs, outputs = features.lerobot_features()
    usual = ClpGrootConfig()  # it pads state to 64 components and action to 32; a robot may have more joints
    # lerobot's GR00T maps minimum and maximum to -1 and 1: here what lies a deviation from the mean.
    statistics = {
        name: values | {"min": values["mean"] - values["std"], "max": values["mean"] + values["std"]}
        for name, values in features.lerobot_statistics().items()
    }
    with TemporaryDirectory() as eagle:
        token = _write_eagle(size, Path(eagle))
        config = ClpGrootConfig(
            **(size.config | {"eagle_config": size.config.get("eagle_config", {}) | {"image_token_index": token}}),
            max_state_dim=max(usual.max_state_dim, features.state_size),
            max_action_dim=max(usual.max_action_dim, features.action_size),
            input_features=inputs,
            output_features=outputs,
            tokenizer_assets_repo=eagle,
            device="cpu",
            push_to_hub=False,
        )
        with empty_weights():
            policy = ClpGrootPolicy(config)
        for processor in make_clp_groot_pre_post_processors(config, statistics):
            for step in processor.steps:
                if isinstance(step, ClpGrootEagleStep):
                    step.max_task_tokens = _TASK_TOKENS
            processor.save_pretrained(folder)
    config.save_pretrained(folder)
    gains = projection_gains(family.modules(read_json_object(folder / "config.json")), OUTPUT_PROJECTIONS, seed)
    write_weights(policy, folder / "model.safetensors", partial(draw_tensor, policy, gains, seed, **NAMES))

    def finish(documents: Mapping[str, dict[str, Any]]) -> None:
        # The processors hold the tokenizer; the folder it came from is no more.
        documents["config.json"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo
        for step in documents["policy_preprocessor.json"]["steps"]:
            if step["registry_name"] == "clp_groot_eagle":
                step["config"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo

    rewrite_json(folder, finish)
