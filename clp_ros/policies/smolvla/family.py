# SPDX-License-Identifier: Apache-2.0
"""SmolVLA (lerobot): a SmolVLM2 language model and an action expert that attend to each other layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.local_paths import move_tokenizer, moved
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Modality, token_modalities
from clp_ros.policies.family import Config, Family, check_depth, coupled_towers
from clp_ros.policies.patched import patched

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

# Folder in which make_checkpoint puts the VLM's config and tokenizer, so that no Hub is needed.
VLM_FOLDER = "vlm"


def _recognises(config: Config) -> bool:
    return config.get("type") == "smolvla"


def layer_stacks(config: Config) -> tuple[LayerStack, ...]:
    """As :attr:`clp_ros.policies.family.Family.layer_stacks`."""
    layers = check_depth(config.get("num_vlm_layers"), "num_vlm_layers")
    expert_layers = config.get("num_expert_layers", -1)
    if not isinstance(expert_layers, int) or (expert_layers > 0 and expert_layers != layers):
        raise ClpError(
            f"num_expert_layers is {expert_layers!r} and num_vlm_layers is {layers}, but both must be equal",
            where="config.json",
            hint="give a checkpoint whose two towers are equally deep",
        )
    # Layers at a multiple of self_attn_every_n_layers have self-attention. The others have cross-attention, with
    # projections of another shape.
    every = config.get("self_attn_every_n_layers", 2)
    if not isinstance(every, int) or isinstance(every, bool):
        raise ClpError(f"self_attn_every_n_layers is {every!r}", where="config.json", hint="write a whole number there")
    period = every if "cross" in config.get("attention_mode", "cross_attn") and every > 0 else 1
    towers = "model.vlm_with_expert."
    return coupled_towers(towers + "vlm.model.text_model", towers + "lm_expert", layers, period)


def _with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    if depths["vlm"] != depths["expert"]:
        raise ValueError(f"SmolVLA's towers must be equally deep, not {dict(depths)}")
    changed = dict(config)
    changed["num_vlm_layers"] = depths["vlm"]
    if changed.get("num_expert_layers", -1) > 0:
        changed["num_expert_layers"] = depths["expert"]
    return changed


def rewrite_local_paths(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    """As :attr:`clp_ros.policies.family.Family.rewrite_local_paths`."""
    # A checkpoint fine-tuned by lerobot has no VLM folder, but points to that of its base checkpoint.
    if not (contents / VLM_FOLDER).is_dir():
        return

    config = documents.get("config.json", {})
    if "vlm_model_name" in config:
        config["vlm_model_name"] = moved(config["vlm_model_name"], VLM_FOLDER, folder)
    move_tokenizer(documents, VLM_FOLDER, folder)


def _build(folder: Path, device: str) -> PreTrainedPolicy:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    # The weights come from the checkpoint, not from the Hub or the VLM's checkpoint.
    pretrained, config.load_vlm_weights = config.load_vlm_weights, False
    if (folder / VLM_FOLDER).is_dir():
        config.vlm_model_name = str(folder / VLM_FOLDER)
    # Hidden states cannot be read from a compiled model.
    with patched(config, compile_model=False):
        policy = SmolVLAPolicy(config)
    if pretrained:
        _set_pretrained_dtypes(policy)
    config.load_vlm_weights = pretrained
    return policy


def _set_pretrained_dtypes(policy: PreTrainedPolicy) -> None:
    """Sets the towers' dtypes to those after lerobot has loaded the VLM's weights, as for smolvla_base.

    They are bfloat16, except for the key and value projections of cross-attention, which lerobot initialises again.
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


def _forward(policy: PreTrainedPolicy, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    model, size = policy.model, batch["observation.state"].shape[0]
    noise = torch.from_numpy(
        rng.standard_normal((size, policy.config.chunk_size, policy.config.max_action_dim), dtype="float32")
    ).to(batch["observation.state"].device)
    # The time distribution of lerobot's training: Beta(1.5, 1) on (0.001, 1).
    time = torch.from_numpy((rng.beta(1.5, 1.0, size) * 0.999 + 0.001).astype("float32")).to(noise.device)

    # lerobot does not return the prefix's padding mask.
    prefix_masks: list[torch.Tensor] = []

    def embed_prefix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_prefix(model, *args, **kwargs)
        prefix_masks.append(embedded[1])
        return embedded

    with patched(model, embed_prefix=embed_prefix):
        policy.forward(batch, noise=noise, time=time)
    padded = batch.get("action_is_pad")
    actions = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device) if padded is None else ~padded
    return {
        "vlm": _prefix_modalities(prefix_masks[0].bool(), batch),
        "expert": token_modalities(actions, (Modality.ACTION, None)),
    }


def _prefix_modalities(mask: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """The modalities of the prefix: images, instruction, one token of the state, then padding to the config's length,
    if any."""
    end = int(mask[0].nonzero().max()) + 1  # the token of the state is never padding
    words = batch["observation.language.tokens"].shape[1]
    runs = (Modality.IMAGE, None), (Modality.LANGUAGE, words), (Modality.STATE, 1)
    return token_modalities(mask, *runs, (Modality.PADDING, mask.shape[1] - end))


FAMILY = Family(
    name="smolvla",
    recognises=_recognises,
    layer_stacks=layer_stacks,
    with_depths=_with_depths,
    rewrite_local_paths=rewrite_local_paths,
    default_ratio={"vlm+expert": 6 / 16},
    build=_build,
    forward=_forward,
    synthetic="clp_ros.policies.smolvla.synthetic",
    sizes=("tiny", "small", "full"),
    skips_absent_cameras=True,
    train_all={"train_expert_only": False, "freeze_vision_encoder": False},
    train_expert={"train_expert_only": True, "freeze_vision_encoder": True},
    output_projections=("model.action_out_proj.",),
)
