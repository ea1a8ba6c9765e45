# SPDX-License-Identifier: Apache-2.0
"""SmolVLA (lerobot): a SmolVLM2 language model and an action expert that attend to each other layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.local_paths import move_tokenizer, moved
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.policies.family import Config, Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.patched import replaced
from clp_ros.policies.random_weights import byte_level_tokenizer, seeded, vary_layers

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

# Where make_checkpoint puts the VLM's config and tokenizer, so that nothing asks a model hub.
VLM_FOLDER = "vlm"


def _recognises(config: Config) -> bool:
    return config.get("type") == "smolvla"


def _modules(config: Config) -> tuple[LayerStack, ...]:
    layers = config.get("num_vlm_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ClpError(
            f"num_vlm_layers is {layers!r}", where="config.json", fix="write the VLM's number of layers there"
        )
    expert_layers = config.get("num_expert_layers", -1)
    if not isinstance(expert_layers, int) or (expert_layers > 0 and expert_layers != layers):
        raise ClpError(
            f"num_expert_layers is {expert_layers!r} but num_vlm_layers is {layers}",
            where="config.json",
            fix="only checkpoints whose two towers are equally deep can be pruned",
        )
    # Layers at a multiple of self_attn_every_n_layers are self-attention, the others cross-attention with projections
    # of another shape.
    every = config.get("self_attn_every_n_layers", 2)
    if not isinstance(every, int) or isinstance(every, bool):
        raise ClpError(f"self_attn_every_n_layers is {every!r}", where="config.json", fix="write a whole number there")
    period = every if "cross" in config.get("attention_mode", "cross_attn") and every > 0 else 1
    tower = "model.vlm_with_expert."
    return (
        LayerStack(
            name="vlm",
            group="vlm+expert",
            layers=layers,
            layer_prefix=tower + "vlm.model.text_model.layers.{layer}.",
            layers_path=tower + "vlm.model.text_model.layers",
            norm_path=tower + "vlm.model.text_model.norm",
            pattern_period=period,
            last_output_unused=True,
        ),
        LayerStack(
            name="expert",
            group="vlm+expert",
            layers=layers,
            layer_prefix=tower + "lm_expert.layers.{layer}.",
            layers_path=tower + "lm_expert.layers",
            norm_path=tower + "lm_expert.norm",
            pattern_period=period,
        ),
    )


def _with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    if depths["vlm"] != depths["expert"]:
        raise ValueError(f"SmolVLA's towers must be equally deep, not {dict(depths)}")
    changed = dict(config)
    changed["num_vlm_layers"] = depths["vlm"]
    if changed.get("num_expert_layers", -1) > 0:
        changed["num_expert_layers"] = depths["expert"]
    return changed


def _localise(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    # A checkpoint that lerobot fine-tuned holds no VLM: it points to that of the checkpoint it came from.
    if not (contents / VLM_FOLDER).is_dir():
        return

    config = documents.get("config.json", {})
    if "vlm_model_name" in config:
        config["vlm_model_name"] = moved(config["vlm_model_name"], VLM_FOLDER, folder)
    move_tokenizer(documents, VLM_FOLDER, folder)


def _build(folder: Path, device: str) -> nn.Module:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    # The weights come from the checkpoint: never from a hub, nor from the VLM's own checkpoint.
    pretrained, config.load_vlm_weights = config.load_vlm_weights, False
    if (folder / VLM_FOLDER).is_dir():
        config.vlm_model_name = str(folder / VLM_FOLDER)
    # What a compiled model computes cannot be read layer by layer.
    with replaced(config, compile_model=False):
        policy = SmolVLAPolicy(config)
    if pretrained:
        _set_pretrained_dtypes(policy)
    config.load_vlm_weights = pretrained
    return policy


def _set_pretrained_dtypes(policy: nn.Module) -> None:
    """Gives the towers the dtypes they have where lerobot loads the VLM's weights first, as with smolvla_base.

    bfloat16, but for the key and value projections of cross-attention, which lerobot makes anew.
    """
    import torch

    towers = policy.model.vlm_with_expert
    towers.to(torch.bfloat16)
    if "cross" in towers.attention_mode:
        every = towers.self_attn_every_n_layers
        for index, layer in enumerate(towers.lm_expert.layers):
            if every <= 0 or index % every:
                layer.self_attn.k_proj.float()
                layer.self_attn.v_proj.float()


def _forward(policy: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    model, size = policy.model, batch["observation.state"].shape[0]
    noise = torch.from_numpy(
        rng.standard_normal((size, policy.config.chunk_size, policy.config.max_action_dim), dtype="float32")
    ).to(batch["observation.state"].device)
    # The distribution lerobot trains with: Beta(1.5, 1) on (0.001, 1).
    time = torch.from_numpy((rng.beta(1.5, 1.0, size) * 0.999 + 0.001).astype("float32")).to(noise.device)

    # lerobot keeps the prefix's padding mask to itself.
    prefix_masks = []

    def embed_prefix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_prefix(model, *args, **kwargs)
        prefix_masks.append(embedded[1])
        return embedded

    with replaced(model, embed_prefix=embed_prefix):
        policy.forward(batch, noise=noise, time=time)
    padded = batch.get("action_is_pad")
    actions = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device) if padded is None else ~padded
    return {"vlm": prefix_masks[0].bool(), "expert": actions}


@dataclass(frozen=True)
class _Size:
    """Widths of a checkpoint made at random; ``full`` is lerobot/smolvla_base's."""

    text: dict[str, Any]
    vision: dict[str, Any]
    scale_factor: int
    layers: int
    dtype: str
    denoising_steps: int


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
_SPECIAL_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def _write_vlm(size: _Size, folder: Path) -> None:
    """Writes the VLM's config, tokenizer and processor, with transformers' own classes."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = byte_level_tokenizer(_SPECIAL_TOKENS)
    edge = size.vision["image_size"]
    tokens = (edge // _PATCH) ** 2 // size.scale_factor**2
    SmolVLMConfig(
        text_config={"model_type": "llama", "max_position_embeddings": 8192, "pad_token_id": 2, **size.text},
        vision_config={"model_type": "smolvlm_vision", "patch_size": _PATCH, **size.vision},
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


def _make_checkpoint(size_name: str, folder: Path, final: Path, features: PolicyFeatures, seed: int) -> None:
    import torch
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    size = _SIZES[size_name]
    _write_vlm(size, folder / VLM_FOLDER)
    inputs, outputs = features.lerobot_features()
    edge = size.vision["image_size"]
    usual = SmolVLAConfig()  # it pads state and action to 32 components; a robot may have more joints
    config = SmolVLAConfig(
        max_state_dim=max(usual.max_state_dim, features.state_size),
        max_action_dim=max(usual.max_action_dim, features.action_size),
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
        vary_layers(policy, _modules({"num_vlm_layers": size.layers}), seed)
    # smolvla_base keeps its two towers in bfloat16; lerobot's projections around them are float32.
    policy.model.vlm_with_expert.to(getattr(torch, size.dtype))
    policy.save_pretrained(folder)
    for processor in make_smolvla_pre_post_processors(config, features.lerobot_statistics()):
        processor.save_pretrained(folder)

    def finish(documents: Mapping[str, dict[str, Any]]) -> None:
        _localise(documents, final, folder)
        # Left open, so that the checkpoint runs on whatever device the machine that loads it has.
        documents["config.json"]["device"] = None

    rewrite_json(folder, finish)


FAMILY = Family(
    name="smolvla",
    recognises=_recognises,
    modules=_modules,
    with_depths=_with_depths,
    localise=_localise,
    default_ratio={"vlm+expert": 6 / 16},
    build=_build,
    forward=_forward,
    make_checkpoint=_make_checkpoint,
    skips_absent_cameras=True,
)
