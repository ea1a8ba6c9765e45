# SPDX-License-Identifier: Apache-2.0
"""π0 (lerobot): a PaliGemma language model and a Gemma action expert that attend to each other layer by layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.local_paths import move_tokenizer
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Modality, token_modalities
from clp_ros.policies.family import Config, Family, check_depth, coupled_towers
from clp_ros.policies.patched import patched
from clp_ros.policies.plugin import register_plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

# Folder in which make_checkpoint puts the tokenizer, so that no Hub is needed.
TOKENIZER_FOLDER = "tokenizer"

_STOCK_LAYERS = 18  # in lerobot's code, for every variant
_TOWERS = "model.paligemma_with_expert."
EMBEDDING = _TOWERS + "paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = _TOWERS + "paligemma.lm_head.weight"


def gemma_family(
    name: str, renamed: tuple[str, str] = ("time_mlp_", "action_time_mlp_"), left_out: str | None = None
) -> Family:
    """Returns the family of lerobot's policy type ``name``, and of the plugin's ``clp_<name>``.

    Args:
        name: The family's name.
        renamed: Prefixes of the layers that take the flow's time: in a checkpoint, and in lerobot's model.
        left_out: Regular expression of the tensors that lerobot does not load.
    """
    return Family(
        name=name,
        recognises=partial(_recognises, name),
        layer_stacks=partial(layer_stacks, name),
        with_depths=partial(_with_depths, name),
        rewrite_local_paths=rewrite_local_paths,
        default_ratio={"vlm+expert": 6 / 18},
        build=_build,
        forward=_forward,
        synthetic="clp_ros.policies.pi0.synthetic",
        wrapper="model.",
        tied={LM_HEAD: EMBEDDING},
        skips_absent_cameras=True,
        unwrapped_name=partial(_unwrapped_name, renamed, left_out),
        refuse_names=partial(_refuse_names, name),
        train_all={"train_expert_only": False, "freeze_vision_encoder": False},
        train_expert={"train_expert_only": True, "freeze_vision_encoder": True},
        output_projections=("model.action_out_proj.",),
    )


def _unwrapped_name(renamed: tuple[str, str], left_out: str | None, tensor: str) -> str | None:
    """Renames tensors without a prefix as ``_fix_pytorch_state_dict_keys`` of lerobot's policy does."""
    if left_out is not None and re.match(left_out, tensor):
        return None
    other, own = renamed
    return own + tensor.removeprefix(other) if tensor.startswith((other + "in.", other + "out.")) else tensor


# Names of the towers in lerobot before 0.4. Later versions of transformers insert `model.`.
_OLD_TOWERS = re.compile(
    r"(model\.)?paligemma_with_expert\.paligemma\.(language_model|vision_tower|multi_modal_projector)\."
)


def _refuse_names(name: str, tensors: Collection[str]) -> None:
    if any(_OLD_TOWERS.match(tensor) for tensor in tensors):
        raise ClpError(
            "the tensors have the names of lerobot before 0.4, which later versions do not load",
            hint=f"start from lerobot/{name}_base, or from a fine-tuned copy of it",
        )


def _recognises(name: str, config: Config) -> bool:
    return config.get("type") in (name, f"clp_{name}")


def layer_stacks(name: str, config: Config) -> tuple[LayerStack, ...]:
    """As :attr:`clp_ros.policies.family.Family.layer_stacks`."""
    layers = _STOCK_LAYERS if config["type"] == name else config.get("num_layers", _STOCK_LAYERS)
    return coupled_towers(
        _TOWERS + "paligemma.model.language_model", _TOWERS + "gemma_expert.model", check_depth(layers, "num_layers")
    )


def _with_depths(name: str, config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    if depths["vlm"] != depths["expert"]:
        raise ValueError(f"the two towers must be equally deep, not {dict(depths)}")
    if config["type"] == name and depths["vlm"] == _STOCK_LAYERS:
        return dict(config)
    return {**config, "type": f"clp_{name}", "num_layers": depths["vlm"]}


def rewrite_local_paths(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    """As :attr:`clp_ros.policies.family.Family.rewrite_local_paths`."""
    if (contents / TOKENIZER_FOLDER).is_dir():
        move_tokenizer(documents, TOKENIZER_FOLDER, folder)


def _build(folder: Path, device: str) -> PreTrainedPolicy:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    from clp_ros.core.json_object import read_json_object

    if read_json_object(folder / "config.json")["type"].startswith("clp_"):
        register_plugin()
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    # Hidden states cannot be read from a compiled model.
    with patched(config, compile_model=False):
        return get_policy_class(config.type)(config)


def _forward(policy: PreTrainedPolicy, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    model, config = policy.model, policy.config
    masks: dict[str, torch.Tensor] = {}

    def sample_noise(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype="float32")).to(device)

    def sample_time(size: int, device: torch.device) -> torch.Tensor:
        time = rng.beta(config.time_sampling_beta_alpha, config.time_sampling_beta_beta, size)
        time = time * config.time_sampling_scale + config.time_sampling_offset
        return torch.from_numpy(time.astype("float32")).to(device)

    # lerobot does not return the padding masks; they are the second result of both embedding functions.
    def embed_prefix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_prefix(model, *args, **kwargs)
        masks["vlm"] = embedded[1].bool()
        return embedded

    def embed_suffix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_suffix(model, *args, **kwargs)
        masks["expert"] = embedded[1].bool()
        return embedded

    own = {"sample_noise": sample_noise, "sample_time": sample_time}
    with patched(model, embed_prefix=embed_prefix, embed_suffix=embed_suffix, **own):
        policy.forward(batch)
    # The actions are last. π0's expert has one token of the state before them, π0.5's has none.
    actions = config.chunk_size
    if (padded := batch.get("action_is_pad")) is not None:
        masks["expert"][:, -actions:] &= ~padded
    words = batch["observation.language.tokens"].shape[1]
    return {
        "vlm": token_modalities(masks["vlm"], (Modality.IMAGE, None), (Modality.LANGUAGE, words)),
        "expert": token_modalities(masks["expert"], (Modality.STATE, None), (Modality.ACTION, actions)),
    }


FAMILY = gemma_family("pi0")
