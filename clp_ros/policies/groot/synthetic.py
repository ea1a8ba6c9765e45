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

# The output projections: a layer adds their products to its input.
OUTPUT_PROJECTIONS = (
    *("self_attn.o_proj.weight", "mlp.down_proj.weight"),  # of the language model
    *("attn1.to_out.0.weight", "ff.net.2.weight"),  # of the other two stacks
)
# Layers with separate weights for each embodiment: biases; and weights, whose input axis is the last but one.
NAMES: Mapping[str, Any] = {"biases": (".bias", ".b"), "inputs_last_but_one": (".W",)}


@dataclass(frozen=True)
class _Size:
    """Config fields of a random checkpoint, and its image size."""

    config: dict[str, Any]
    pixels: int
    patch: int = 14


_SIZES = {
    # The widths of the language model (48), its keys (32) and the diffusion transformer (40) differ, so that a block
    # that attends to one cannot replace a block that attends to another.
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
# An image's placeholder and LeRobot's text around an instruction are one token each. All other text has one token for
# each byte, because the tokenizer has no merges. Up to nine cameras.
_SPECIAL_TOKENS = {
    "image_token": "<IMG_CONTEXT>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "task_start_token": "['",
    "task_end_token": "']",
    **{f"image_{number}_token": f"<image {number}>" for number in range(1, 10)},
}
# With two images of 256 tokens each, this gives the 552 tokens that were measured on the released model.
_TASK_TOKENS = 32
# Eagle's template for one message of images and text, without the words for the roles.
_CHAT_TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for part in messages[0].content %}{% if part.type == 'image' %}"
    "{% set images.count = images.count + 1 %}<image-{{ images.count }}>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)


def _write_eagle(size: _Size, folder: Path) -> int:
    """Writes the settings of Eagle's tokenizer and processor; returns the id of the image token."""
    tokenizer = byte_level_tokenizer(_SPECIAL_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    images = {
        "size": {"height": size.pixels, "width": size.pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "do_resize": False,  # cutting an image into tiles resizes it
        "do_pad": False,
    }
    texts = {"image_token": "<IMG_CONTEXT>", "tokens_per_tile": (size.pixels // size.patch) ** 2}
    for name, settings in (("preprocessor_config.json", images), ("processor_config.json", texts)):
        (folder / name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return tokenizer.image_token_id


def make_checkpoint(family: Family, size_name: str, folder: Path, features: PolicyFeatures, seed: int) -> None:
    """Writes a random checkpoint; see :attr:`clp_ros.policies.family.Family.synthetic`."""
    from tempfile import TemporaryDirectory

    register_plugin()
    from lerobot_policy_clp.configuration_clp_groot import ClpGrootConfig
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy
    from lerobot_policy_clp.processor_clp_groot import ClpGrootEagleStep, make_clp_groot_pre_post_processors

    size = _SIZES[size_name]
    inputs, outputs = features.lerobot_features()
    usual = ClpGrootConfig()  # pads the state to 64 and the action to 32 components; a robot may have more joints
    # lerobot's GR00T maps minimum and maximum to -1 and 1. Here these are one standard deviation from the mean.
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
    gains = projection_gains(family.layer_stacks(read_json_object(folder / "config.json")), OUTPUT_PROJECTIONS, seed)
    write_weights(policy, folder / "model.safetensors", partial(draw_tensor, policy, gains, seed, **NAMES))

    def finish(documents: Mapping[str, dict[str, Any]]) -> None:
        # The processors contain the tokenizer; its temporary folder is gone.
        documents["config.json"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo
        for step in documents["policy_preprocessor.json"]["steps"]:
            if step["registry_name"] == "clp_groot_eagle":
                step["config"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo

    rewrite_json(folder, finish)
