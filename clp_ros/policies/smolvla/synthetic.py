# SPDX-License-Identifier: Apache-2.0
"""SmolVLA's random checkpoints, made with the real classes and without a model hub."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clp_ros.policies.family import Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.random_weights import byte_level_tokenizer, seeded, vary_layers
from clp_ros.policies.smolvla.family import VLM_FOLDER

# The output projections: a layer adds their products to its input.
_OUTPUT_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class _Size:
    """Widths of a random checkpoint; ``full`` has those of lerobot/smolvla_base.

    Attributes:
        text, vision: Fields of the VLM's two configs.
        scale_factor: Image tokens are blocks of this many patches in height and in width.
        layers: Number of layers of each tower.
        dtype: Of the two towers' weights.
        denoising_steps: Number of denoising steps.
        from_scratch: Whether the checkpoint is made to be trained: every weight is trainable, the layers begin alike,
            images have the size that the vision tower sees, and the tokenizer has tokens for the words of
            instructions.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    scale_factor: int
    layers: int
    dtype: str
    denoising_steps: int
    from_scratch: bool = False


_SIZES = {
    # The expert's width (48), its heads' width (64) and the VLM's key/value width (32) all differ, so that a removal
    # set that breaks the alternation of self- and cross-attention cannot load by accident.
    "tiny": _Size(
        text={
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 16,
            "vocab_size": 320,
        },
        vision={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 128,
        },
        scale_factor=4,
        layers=16,
        dtype="float32",
        denoising_steps=2,
    ),
    # Learns the simulated tasks on a CPU: images of 96x96 pixels, each of 16 tokens.
    "small": _Size(
        text={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_hidden_layers": 12,
        },
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 96,
            "patch_size": 12,
        },
        scale_factor=2,
        layers=12,
        dtype="float32",
        denoising_steps=5,
        from_scratch=True,
    ),
    "full": _Size(
        text={
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "num_hidden_layers": 32,
            "vocab_size": 49280,
        },
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
        },
        scale_factor=4,
        layers=16,
        dtype="bfloat16",
        denoising_steps=10,
    ),
}
_PATCH = 16
# What the tokenizer of a policy trained from nothing has whole words of. Other words cost a token for each letter.
_INSTRUCTIONS = (
    "Pick up the cube and lift it. Take the cube and hold it up. "
    "Grasp the block with the gripper and raise the object.",
    "Put the cube into the bin. Drop the cube into the bin. Place the cube in the box on the table.",
    "Push the cube to the marked zone. Push the cube onto the disc. Slide the cube into the zone.",
    "Hand the cube over from the left arm to the right arm. Lift the bar with both hands. "
    "Move, open, close, turn, stack.",
    "red orange yellow green blue purple pink turquoise white black grey brown beige olive slate",
)
_SPECIAL_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def _write_vlm(size: _Size, folder: Path) -> None:
    """Writes the VLM's config, tokenizer and processor with transformers' classes."""
    from transformers import AutoConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    tokenizer = byte_level_tokenizer(_SPECIAL_TOKENS, _INSTRUCTIONS if size.from_scratch else ())
    vision = {"model_type": "smolvlm_vision", "patch_size": _PATCH, **size.vision}
    edge = vision["image_size"]
    tokens = (edge // vision["patch_size"]) ** 2 // size.scale_factor**2
    AutoConfig.for_model(
        "smolvlm",
        text_config={
            "model_type": "llama",
            "max_position_embeddings": 8192,
            "pad_token_id": 2,
            "vocab_size": len(tokenizer),
            **size.text,
        },
        vision_config=vision,
        scale_factor=size.scale_factor,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=2,
        architectures=["SmolVLMForConditionalGeneration"],
    ).save_pretrained(folder)
    images = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": edge}}
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**images),
        image_seq_len=tokens,
    ).save_pretrained(folder)


def make_checkpoint(family: Family, size_name: str, folder: Path, features: PolicyFeatures, seed: int) -> None:
    """Writes a random checkpoint; see :attr:`clp_ros.policies.family.Family.synthetic`."""
    import torch
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    size = _SIZES[size_name]
    _write_vlm(size, folder / VLM_FOLDER)
    edge = size.vision["image_size"]
    usual = SmolVLAConfig()  # pads state and action to 32 components; a robot may have more joints
    widths = {
        "max_state_dim": max(usual.max_state_dim, features.state_size),
        "max_action_dim": max(usual.max_action_dim, features.action_size),
    }
    if size.from_scratch:
        features = dataclasses.replace(features, cameras=dict.fromkeys(features.cameras, (edge, edge)))
        widths = {
            # lerobot leaves padding out of the loss. The velocity of padded components would stay random.
            "max_state_dim": features.state_size,
            "max_action_dim": features.action_size,
            "train_expert_only": False,
            "freeze_vision_encoder": False,
            "tokenizer_max_length": 24,
        }
    inputs, outputs = features.lerobot_features()
    config = SmolVLAConfig(
        **widths,
        num_steps=size.denoising_steps,
        input_features=inputs,
        output_features=outputs,
        vlm_model_name=str(folder / VLM_FOLDER),
        load_vlm_weights=False,
        resize_imgs_with_padding=(edge, edge),
        num_vlm_layers=size.layers,
        num_expert_layers=0,
        device="cpu",
        push_to_hub=False,
    )
    with seeded(seed):
        policy = SmolVLAPolicy(config)
        if not size.from_scratch:
            vary_layers(policy, family.layer_stacks({"num_vlm_layers": size.layers}), _OUTPUT_PROJECTIONS, seed)
    # smolvla_base keeps its two towers in bfloat16; lerobot's projections around them are float32.
    policy.model.vlm_with_expert.to(getattr(torch, size.dtype))
    policy.save_pretrained(folder)
    for processor in make_smolvla_pre_post_processors(config, features.lerobot_statistics()):
        processor.save_pretrained(folder)
