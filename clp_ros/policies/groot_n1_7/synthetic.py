# SPDX-License-Identifier: Apache-2.0
"""Random checkpoints of GR00T N1.7, made with the real classes and without a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from clp_ros.core.json_object import read_json_object
from clp_ros.policies.empty_weights import empty_weights
from clp_ros.policies.family import Config, Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.groot.synthetic import NAMES, OUTPUT_PROJECTIONS
from clp_ros.policies.groot_n1_7.family import PROCESSOR_FOLDER
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.random_weights import byte_level_tokenizer, draw_tensor, projection_gains, write_weights

# Config fields of a random checkpoint. The tiny widths of the language model, its keys and the diffusion transformer
# differ, so that a block that attends to one cannot replace a block that attends to another.
_SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "llm_layers": 6,
        "vl_self_attention_layers": 4,
        "dit_layers": 8,
        "chunk_size": 16,
        "n_action_steps": 16,
        "use_bf16": False,
        "model_config": {
            "action_horizon": 16,
            "hidden_size": 40,
            "input_embedding_dim": 48,
            "backbone_embedding_dim": 64,
            "max_num_embodiments": 12,
            "max_seq_len": 32,
            "num_inference_timesteps": 2,
            "state_dropout_prob": 0.0,
            "diffusion_model_cfg": {
                "positional_embeddings": None,
                "num_attention_heads": 3,
                "attention_head_dim": 16,
                "norm_type": "ada_norm",
                "dropout": 0.0,
                "final_dropout": True,
                "output_dim": 40,
                "interleave_self_attention": True,
            },
            "vl_self_attention_cfg": {
                "positional_embeddings": None,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "dropout": 0.0,
                "final_dropout": True,
            },
        },
    },
    # As published; for fine-tuning, lerobot would convert it to float32.
    "full": {"model_params_fp32": False},
}
_TINY_BACKBONE: Mapping[str, Any] = {
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 6,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0, 1],
    },
}
_TINY_IMAGE = 64  # pixels: 4 tokens a camera
_SPECIAL_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "message_start_token": "<|im_start|>",
    "message_end_token": "<|im_end|>",
}
# Qwen3-VL's template for one message of images and text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def _write_processor(backbone: Config, pixels: int, folder: Path) -> dict[str, int]:
    """Writes the backbone's tokenizer and image processors; returns the token ids for its config."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    tokenizer = byte_level_tokenizer(_SPECIAL_TOKENS)
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    vision = backbone["vision_config"]
    settings = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "size": {"shortest_edge": pixels, "longest_edge": 256 * pixels},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    Qwen2VLImageProcessor(**settings).save_pretrained(folder)
    Qwen3VLVideoProcessor(**settings).save_pretrained(folder)
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in list(_SPECIAL_TOKENS)[:4]}


def make_checkpoint(family: Family, size_name: str, folder: Path, features: PolicyFeatures, seed: int) -> None:
    """Writes a random checkpoint; see :attr:`clp_ros.policies.family.Family.synthetic`."""
    register_plugin()
    from lerobot.policies.groot.processor_groot import GrootN17VLMEncodeStep
    from lerobot_policy_clp.compat import cosmos_reason2_config
    from lerobot_policy_clp.configuration_clp_groot_n1_7 import ClpGrootN17Config
    from lerobot_policy_clp.modeling_clp_groot_n1_7 import ClpGrootN17Policy
    from lerobot_policy_clp.processor_clp_groot_n1_7 import make_clp_groot_n1_7_pre_post_processors

    size, tiny = _SIZES[size_name], size_name == "tiny"
    backbone = dict(_TINY_BACKBONE) if tiny else cosmos_reason2_config().to_dict()
    edge = _TINY_IMAGE if tiny else 256
    backbone |= _write_processor(backbone, edge**2, folder / PROCESSOR_FOLDER)
    inputs, outputs = features.lerobot_features()
    usual = ClpGrootN17Config()  # pads state and action to 132 components; a robot may have more joints
    state, action = max(usual.max_state_dim, features.state_size), max(usual.max_action_dim, features.action_size)
    widths = {"max_state_dim": state, "max_action_dim": action}
    config = ClpGrootN17Config(
        **(size | widths | {"model_config": size.get("model_config", {}) | widths}),
        backbone_config=backbone,
        input_features=inputs,
        output_features=outputs,
        device="cpu",
        push_to_hub=False,
    )
    with empty_weights():
        policy = ClpGrootN17Policy(config)
    config.save_pretrained(folder)
    gains = projection_gains(family.layer_stacks(read_json_object(folder / "config.json")), OUTPUT_PROJECTIONS, seed)
    write_weights(policy, folder / "model.safetensors", partial(draw_tensor, policy, gains, seed, **NAMES))

    # lerobot's normalisation needs the actions' range, here between outer quantiles.
    statistics = {
        name: {**values, "min": values["q01"], "max": values["q99"]}
        for name, values in features.lerobot_statistics().items()
    }
    for processor in make_clp_groot_n1_7_pre_post_processors(config, statistics):
        for step in processor.steps:
            if isinstance(step, GrootN17VLMEncodeStep):
                step.model_name = str(folder / PROCESSOR_FOLDER)
                step.device = None  # not set, as in the config, so that it runs on any device
                step.image_target_size, step.image_crop_size = [edge] * 2, [edge * 230 // 256] * 2
        processor.save_pretrained(folder)
