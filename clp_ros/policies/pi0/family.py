# SPDX-License-Identifier: Apache-2.0
"""π0 (lerobot): a PaliGemma language model and a Gemma action expert that attend to each other layer by layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.local_paths import move_tokenizer
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.policies.empty_weights import empty_weights
from clp_ros.policies.family import Config, Family
from clp_ros.policies.features import PolicyFeatures
from clp_ros.policies.patched import replaced
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.random_weights import byte_level_tokenizer, draw_tensor, projection_gains, write_weights

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

# Where make_checkpoint puts the tokenizer, so that nothing asks a model hub.
TOKENIZER_FOLDER = "tokenizer"

_STOCK_LAYERS = 18  # in lerobot's code, for every variant
_TOWERS = "model.paligemma_with_expert."
_EMBEDDING = _TOWERS + "paligemma.model.language_model.embed_tokens.weight"
_LM_HEAD = _TOWERS + "paligemma.lm_head.weight"


def gemma_family(name: str) -> Family:
    """π0 or π0.5: what lerobot calls ``name``, and the plugin ``clp_<name>``."""
    return Family(
        name=name,
        recognises=partial(_recognises, name),
        modules=partial(_modules, name),
        with_depths=partial(_with_depths, name),
        localise=_localise,
        default_ratio={"vlm+expert": 6 / 18},
        build=_build,
        forward=_forward,
        make_checkpoint=partial(_make_checkpoint, name),
        wrapper="model.",
        tied={_LM_HEAD: _EMBEDDING},
        skips_absent_cameras=True,
        unwrapped_name=partial(_unwrapped_name, name),
        refuse_names=partial(_refuse_names, name),
    )


# Norms of the action expert that have no weight of their own in π0.5: its time sets them.
_EXPERT_NORMS = re.compile(
    r"paligemma_with_expert\.gemma_expert\.model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight"
)
# The two families' names of the layers that take the flow's time in.
_TIME_LAYERS = {"pi0": ("time_mlp_", "action_time_mlp_"), "pi05": ("action_time_mlp_", "time_mlp_")}


def _unwrapped_name(name: str, tensor: str) -> str | None:
    """What lerobot's ``PI0Policy._fix_pytorch_state_dict_keys`` and π0.5's make of names without a prefix."""
    if name == "pi05" and (tensor.startswith("state_proj.") or _EXPERT_NORMS.match(tensor)):
        return None
    other, own = _TIME_LAYERS[name]
    return own + tensor.removeprefix(other) if tensor.startswith((other + "in.", other + "out.")) else tensor


# The towers as lerobot before 0.4 named them: transformers has since put `model.` between.
_OLD_TOWERS = re.compile(
    r"(model\.)?paligemma_with_expert\.paligemma\.(language_model|vision_tower|multi_modal_projector)\."
)


def _refuse_names(name: str, tensors: Collection[str]) -> None:
    if any(_OLD_TOWERS.match(tensor) for tensor in tensors):
        raise ClpError(
            "its tensors are named as in lerobot before 0.4, which no later one loads",
            fix=f"start from lerobot/{name}_base, or a fine-tuning of it, instead",
        )


def _recognises(name: str, config: Config) -> bool:
    return config.get("type") in (name, f"clp_{name}")


def _modules(name: str, config: Config) -> tuple[LayerStack, ...]:
    layers = _STOCK_LAYERS if config["type"] == name else config.get("num_layers", _STOCK_LAYERS)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ClpError(f"num_layers is {layers!r}", where="config.json", fix="write the number of layers there")
    vlm, expert = _TOWERS + "paligemma.model.language_model", _TOWERS + "gemma_expert.model"
    return (
        LayerStack(
            name="vlm",
            group="vlm+expert",
            layers=layers,
            layer_prefix=vlm + ".layers.{layer}.",
            layers_path=vlm + ".layers",
            norm_path=vlm + ".norm",
            last_output_unused=True,
        ),
        LayerStack(
            name="expert",
            group="vlm+expert",
            layers=layers,
            layer_prefix=expert + ".layers.{layer}.",
            layers_path=expert + ".layers",
            norm_path=expert + ".norm",
        ),
    )


def _with_depths(name: str, config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    if depths["vlm"] != depths["expert"]:
        raise ValueError(f"the two towers must be equally deep, not {dict(depths)}")
    if config["type"] == name and depths["vlm"] == _STOCK_LAYERS:
        return dict(config)
    return {**config, "type": f"clp_{name}", "num_layers": depths["vlm"]}


def _localise(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    if (contents / TOKENIZER_FOLDER).is_dir():
        move_tokenizer(documents, TOKENIZER_FOLDER, folder)


def _build(folder: Path, device: str) -> nn.Module:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    from clp_ros.core.json_object import read_json_object

    if read_json_object(folder / "config.json")["type"].startswith("clp_"):
        register_plugin()
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    # What a compiled model computes cannot be read layer by layer.
    with replaced(config, compile_model=False):
        return get_policy_class(config.type)(config)


def _forward(policy: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    model, config = policy.model, policy.config
    masks: dict[str, torch.Tensor] = {}

    def sample_noise(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype="float32")).to(device)

    def sample_time(size: int, device: torch.device) -> torch.Tensor:
        time = rng.beta(config.time_sampling_beta_alpha, config.time_sampling_beta_beta, size)
        time = time * config.time_sampling_scale + config.time_sampling_offset
        return torch.from_numpy(time.astype("float32")).to(device)

    # lerobot keeps the padding masks to itself: the second of what either embedding gives.
    def embed_prefix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_prefix(model, *args, **kwargs)
        masks["vlm"] = embedded[1].bool()
        return embedded

    def embed_suffix(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embedded = type(model).embed_suffix(model, *args, **kwargs)
        masks["expert"] = embedded[1].bool()
        return embedded

    own = {"sample_noise": sample_noise, "sample_time": sample_time}
    with replaced(model, embed_prefix=embed_prefix, embed_suffix=embed_suffix, **own):
        policy.forward(batch)
    if (padded := batch.get("action_is_pad")) is not None:
        # The actions come last: π0's expert takes the state as one token before them.
        masks["expert"][:, -padded.shape[1] :] &= ~padded
    return masks


# Config fields of a checkpoint made at random. The two towers' widths differ from each other and from their heads'.
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
    # As the released models are trained further: in bfloat16, the vision tower frozen.
    "full": {"dtype": "bfloat16", "freeze_vision_encoder": True},
}


def _make_checkpoint(name: str, size_name: str, folder: Path, final: Path, features: PolicyFeatures, seed: int) -> None:
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

    size = _SIZES[size_name]
    policy_type = name
    if "num_layers" in size:
        policy_type = f"clp_{name}"
        register_plugin()
    byte_level_tokenizer({}).save_pretrained(folder / TOKENIZER_FOLDER)
    usual = make_policy_config(name)  # it pads state and action to 32 components; a robot may have more joints
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
    modules = _modules(name, {"type": policy_type, **size})
    write_weights(policy, folder / "model.safetensors", partial(_fill, policy, projection_gains(modules, seed), seed))

    # lerobot's own processors ask the model hub for their tokenizer.
    processors = import_module(f"lerobot.policies.{name}.processor_{name}")
    tokenize = partial(_tokenizer_step, processors.TokenizerProcessorStep, folder / TOKENIZER_FOLDER)
    with replaced(processors, TokenizerProcessorStep=tokenize):
        for processor in make_pre_post_processors(config, dataset_stats=features.lerobot_statistics()):
            processor.save_pretrained(folder)

    def finish(documents: Mapping[str, dict[str, Any]]) -> None:
        _localise(documents, final, folder)
        # Left open, so that the checkpoint runs on whatever device the machine that loads it has.
        documents["config.json"]["device"] = None

    rewrite_json(folder, finish)


def _tokenizer_step(step: Any, tokenizer: Path, **settings: Any) -> Any:
    return step(**(settings | {"tokenizer_name": str(tokenizer)}))


def _fill(policy: nn.Module, gains: Mapping[str, float], seed: int, name: str, tensor: torch.Tensor) -> None:
    if name == _LM_HEAD:
        name = _EMBEDDING  # tied in the published model
    draw_tensor(policy, gains, seed, name, tensor)
    owner, _, attribute = name.rpartition(".")
    if attribute == "weight" and type(policy.get_submodule(owner)).__name__ == "PiGemmaRMSNorm":
        tensor.zero_()  # Gemma's norms multiply by one more than their weight


FAMILY = gemma_family("pi0")
