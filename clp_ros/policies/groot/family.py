# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 (lerobot 0.5.1): an Eagle 2.5 language model, self-attention over its output, a diffusion transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.compat.lerobot import groot_model
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.base import Modality, token_modalities
from clp_ros.policies.family import Config, Family, check_depth
from clp_ros.policies.patched import patched
from clp_ros.policies.plugin import register_plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

_TYPE = "clp_groot"
# Names of the model in NVIDIA's config.json and in checkpoints fine-tuned from it.
_NVIDIA_NAMES = {"gr00t_n1_5", "gr00tn1_5", "gr00t_n15"}
# Depths of nvidia/GR00T-N1.5-3B. The config.json of lerobot's checkpoints does not contain them.
_DEPTHS = {"llm": 12, "vl_self_attention": 4, "dit": 16}
# The keys of the depths in NVIDIA's config.json.
_NVIDIA_DEPTHS = {
    "llm": ("backbone_cfg", "select_layer"),
    "vl_self_attention": ("action_head_cfg", "vl_self_attention_cfg", "num_layers"),
    "dit": ("action_head_cfg", "diffusion_model_cfg", "num_layers"),
}


def _recognises(config: Config) -> bool:
    if config.get("type") == "groot":
        # lerobot 0.6 writes the same type for N1.7, and refuses a config with this field set.
        return isinstance(config.get("tokenizer_assets_repo"), str)
    return config.get("type") == _TYPE or _is_nvidia(config)


def is_nvidia(spellings: Collection[str], config: Config) -> bool:
    """Whether this config.json has NVIDIA's layout, not lerobot's.

    Args:
        spellings: The model's names, in small letters and with underscores.
        config: The config.json.
    """
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    return "type" not in config and any(str(name).lower().replace("-", "_") in spellings for name in names)


_is_nvidia = partial(is_nvidia, _NVIDIA_NAMES)


def _depths(config: Config) -> dict[str, Any]:
    if config.get("type") == "groot":
        depths: dict[str, Any] = dict(_DEPTHS)
    elif config.get("type") == _TYPE:
        depths = {name: config.get(f"{name}_layers", usual) for name, usual in _DEPTHS.items()}
    else:
        depths = {}
        for name, path in _NVIDIA_DEPTHS.items():
            depths[name] = config
            for key in path:
                depths[name] = depths[name].get(key) if isinstance(depths[name], Mapping) else None
    for name, layers in depths.items():
        check_depth(layers, f"the number of layers of {name}")
    return depths


def layer_stacks(config: Config) -> tuple[LayerStack, ...]:
    """As :attr:`clp_ros.policies.family.Family.layer_stacks`."""
    depths = _depths(config)
    # Checkpoints in NVIDIA's layout lack lerobot's prefix.
    root = "" if _is_nvidia(config) else "_groot_model."
    stacks = {
        "llm": root + "backbone.eagle_model.language_model.model.layers",
        "vl_self_attention": root + "action_head.vl_self_attention.transformer_blocks",
        "dit": root + "action_head.model.transformer_blocks",
    }
    # The diffusion transformer's even blocks attend to the language model's output, its odd ones to the actions.
    periods = {"dit": 2 if _interleaves(config) else 1}
    return tuple(
        LayerStack(
            name=name,
            group=name,
            layers=depths[name],
            layer_prefix=path + ".{layer}.",
            layers_path=path,
            pattern_period=periods.get(name, 1),
            probe=None,
        )
        for name, path in stacks.items()
    )


def _interleaves(config: Config) -> bool:
    head = config.get("action_head_cfg" if _is_nvidia(config) else "action_head_config") or {}
    # A missing field in NVIDIA's config means off. The plugin completes its own config from the published one, which
    # has it.
    return bool(head.get("diffusion_model_cfg", {}).get("interleave_self_attention", not _is_nvidia(config)))


def _with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    if _is_nvidia(config):
        changed = copy.deepcopy(dict(config))
        for name, (*path, field) in _NVIDIA_DEPTHS.items():
            holder = changed
            for key in path:
                holder = holder[key]
            holder[field] = depths[name]
        return changed
    if dict(depths) == _depths(config):
        return dict(config)
    return {**config, "type": _TYPE, **{f"{name}_layers": layers for name, layers in depths.items()}}


def _rewrite_local_paths(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    """Replaces lerobot's processor steps by the plugin's. There are no paths into the checkpoint."""
    # In both files, because lerobot's steps would run the code of any tokenizer that they name.
    for steps in [documents.get(f"policy_{side}processor.json", {}).get("steps", []) for side in ("pre", "post")]:
        for step in steps:
            if step.get("registry_name") == "groot_eagle_encode_v3":
                step["registry_name"] = "clp_groot_eagle"
        steps[:] = [step for step in steps if step.get("registry_name") != "groot_eagle_collate_v3"]
    after = documents.get("policy_postprocessor.json", {}).get("steps", [])
    names = [step.get("registry_name") for step in after]
    if "groot_action_unpack_unnormalize_v1" in names and "clp_groot_chunk" not in names:
        place = names.index("groot_action_unpack_unnormalize_v1")
        fold, unfold = ({"registry_name": "clp_groot_chunk", "config": {"fold": side}} for side in (True, False))
        after[place : place + 1] = [fold, after[place], unfold]


def _build(folder: Path, device: str) -> PreTrainedPolicy:
    from dataclasses import fields

    from lerobot.configs.policies import PreTrainedConfig

    if _is_nvidia(read_json_object(folder / "config.json")):
        raise ClpError(
            "a checkpoint in NVIDIA's layout can be pruned but not run: it has no cameras and no lerobot processors",
            where=folder,
            hint="save it in lerobot's layout, as README.md of lerobot_policy_clp shows",
        )
    register_plugin()
    from lerobot_policy_clp.configuration_clp_groot import ClpGrootConfig
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy

    config = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(config, ClpGrootConfig):
        # lerobot builds the model by loading the base model, and fails.
        config = ClpGrootConfig(**{field.name: getattr(config, field.name) for field in fields(config)})
    config.device = device
    return ClpGrootPolicy(config)


def run_training_graph(
    policy: PreTrainedPolicy,
    batch: dict[str, Any],
    rng: np.random.Generator,
    flow_time: Callable[[np.ndarray, float], np.ndarray],
) -> None:
    """Runs the training-time graph once, with noise and times from the distributions of lerobot's training step.

    Args:
        policy: The policy.
        batch: Its batch.
        rng: Source of noise and times.
        flow_time: Returns the flow's times from beta-distributed numbers, (batch,) float64, and the config's
            ``noise_s``.
    """
    import torch
    from lerobot_policy_clp.fixed_noise import FixedNoise

    head, actions = groot_model(policy).action_head, batch["action"]
    noise = torch.from_numpy(rng.standard_normal(tuple(actions.shape), dtype="float32"))
    beta = rng.beta(head.config.noise_beta_alpha, head.config.noise_beta_beta, len(actions))
    time = torch.from_numpy(flow_time(beta, head.config.noise_s).astype("float32"))

    def sample_time(_: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return time.to(device, dtype)

    with FixedNoise(noise), patched(head, sample_time=sample_time):
        policy.forward(batch)


def word_modalities(is_image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the modality of each token of a text with images. Special tokens that enclose an image are language.

    Args:
        is_image: Which tokens represent a part of an image: bool (batch, tokens).
        mask: Which tokens are not padding: bool (batch, tokens).
    """
    import torch

    return torch.where(is_image, Modality.IMAGE, Modality.LANGUAGE).to(torch.int8) * mask


def _forward(policy: PreTrainedPolicy, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    run_training_graph(policy, batch, rng, lambda beta, noise_s: 1 - beta / noise_s)
    model = groot_model(policy)
    valid = batch["action_mask"].bool().any(dim=-1)
    if (padded := batch.get("action_is_pad")) is not None:
        valid = valid & ~padded[:, : valid.shape[1]]
    is_image = batch["eagle_input_ids"] == model.backbone.eagle_model.image_token_index
    words = word_modalities(is_image, batch["eagle_attention_mask"].bool())
    # Before the actions: one token of the state, and the learned future tokens.
    learned = model.action_head.future_tokens.num_embeddings
    others = valid.new_ones(len(valid), 1 + learned)
    runs = (Modality.STATE, 1), (Modality.LEARNED, learned), (Modality.ACTION, None)
    dit = token_modalities(torch.cat((others, valid), dim=1), *runs)
    return {"llm": words, "vl_self_attention": words, "dit": dit}


FAMILY = Family(
    name="groot",
    recognises=_recognises,
    layer_stacks=layer_stacks,
    with_depths=_with_depths,
    rewrite_local_paths=_rewrite_local_paths,
    default_ratio={"llm": 7 / 12, "vl_self_attention": 1 / 4, "dit": 8 / 16},
    build=_build,
    forward=_forward,
    synthetic="clp_ros.policies.groot.synthetic",
    lerobot=">=0.5.1,<0.6",
    loads=lambda config: not _is_nvidia(config),
    denoise="_groot_model.action_head.model.forward",
    ignores_padding=False,
    train_all={"tune_llm": True, "tune_visual": True, "tune_projector": True, "tune_diffusion_model": True},
    train_expert={"tune_llm": False, "tune_visual": False, "tune_projector": True, "tune_diffusion_model": True},
    output_projections=("_groot_model.action_head.action_decoder.",),
)
