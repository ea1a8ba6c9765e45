# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 (lerobot 0.5.1): an Eagle 2.5 language model, self-attention over its output, a diffusion transformer."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json
from clp_ros.core.json_object import read_json_object
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

_TYPE = "clp_groot"
# As NVIDIA's config.json spells the model, and the checkpoints fine-tuned from it.
_NVIDIA_NAMES = {"gr00t_n1_5", "gr00tn1_5", "gr00t_n15"}
# Of nvidia/GR00T-N1.5-3B, where lerobot's own checkpoints take it from: their config.json does not say.
_DEPTHS = {"llm": 12, "vl_self_attention": 4, "dit": 16}
# Where NVIDIA's config.json says it.
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


def _is_nvidia(config: Config) -> bool:
    """Whether this is the config.json of NVIDIA's own checkpoints, which know nothing of lerobot."""
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    return "type" not in config and any(str(name).lower().replace("-", "_") in _NVIDIA_NAMES for name in names)


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
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise ClpError(
                f"the number of layers of {name} is {layers!r}", where="config.json", fix="write a whole number there"
            )
    return depths


def _modules(config: Config) -> tuple[LayerStack, ...]:
    depths = _depths(config)
    # NVIDIA's own checkpoints hold what lerobot wraps.
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
    # Where NVIDIA's config leaves it out, it is off; the plugin completes its own from the published one, which has it.
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


def _localise(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    """Lets the plugin's processor steps do what lerobot's cannot; there is no path to what the checkpoint holds."""
    # In either file: lerobot's would run the code of whatever tokenizer they name.
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


def _build(folder: Path, device: str) -> nn.Module:
    from dataclasses import fields

    from lerobot.configs.policies import PreTrainedConfig

    if _is_nvidia(read_json_object(folder / "config.json")):
        raise ClpError(
            "NVIDIA's own checkpoints can be pruned, but have no cameras and no processors of lerobot's to run with",
            where=folder,
            fix="save it as lerobot's with these, as README.md of lerobot_policy_clp shows",
        )
    register_plugin()
    from lerobot_policy_clp.configuration_clp_groot import ClpGrootConfig
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy

    config = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(config, ClpGrootConfig):
        # lerobot builds its own by loading the base model, in a way that fails.
        config = ClpGrootConfig(**{field.name: getattr(config, field.name) for field in fields(config)})
    config.device = device
    return ClpGrootPolicy(config)


def _forward(policy: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch
    from lerobot_policy_clp.fixed_noise import FixedNoise

    from clp_ros.core.compat.lerobot import groot_model

    head, actions = groot_model(policy).action_head, batch["action"]
    noise = torch.from_numpy(rng.standard_normal(tuple(actions.shape), dtype="float32"))
    # The distribution lerobot trains with.
    beta = rng.beta(head.config.noise_beta_alpha, head.config.noise_beta_beta, len(actions))
    time = torch.from_numpy((1 - beta / head.config.noise_s).astype("float32"))

    def sample_time(_: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return time.to(device, dtype)

    with FixedNoise(noise), replaced(head, sample_time=sample_time):
        policy.forward(batch)
    tokens = batch["eagle_attention_mask"].bool()
    valid = batch["action_mask"].bool().any(dim=-1)
    if (padded := batch.get("action_is_pad")) is not None:
        valid = valid & ~padded[:, : valid.shape[1]]
    # Before the actions: one token of the state, and the learned ones that stand for what is to come.
    others = valid.new_ones(len(valid), 1 + head.future_tokens.num_embeddings)
    return {"llm": tokens, "vl_self_attention": tokens, "dit": torch.cat((others, valid), dim=1)}


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
    return tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def _make_checkpoint(size_name: str, folder: Path, final: Path, features: PolicyFeatures, seed: int) -> None:
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
    gains = projection_gains(_modules(read_json_object(folder / "config.json")), seed)
    write_weights(policy, folder / "model.safetensors", partial(draw_tensor, policy, gains, seed))

    def finish(documents: Mapping[str, dict[str, Any]]) -> None:
        # Left open, so that the checkpoint runs on whatever device the machine that loads it has.
        documents["config.json"]["device"] = None
        # The processors hold the tokenizer; the folder it came from is no more.
        documents["config.json"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo
        for step in documents["policy_preprocessor.json"]["steps"]:
            if step["registry_name"] == "clp_groot_eagle":
                step["config"]["tokenizer_assets_repo"] = usual.tokenizer_assets_repo

    rewrite_json(folder, finish)


FAMILY = Family(
    name="groot",
    recognises=_recognises,
    modules=_modules,
    with_depths=_with_depths,
    localise=_localise,
    default_ratio={"llm": 7 / 12, "vl_self_attention": 1 / 4, "dit": 8 / 16},
    build=_build,
    forward=_forward,
    make_checkpoint=_make_checkpoint,
    lerobot=">=0.5.1,<0.6",
    loads=lambda config: not _is_nvidia(config),
    denoise="_groot_model.action_head.model.forward",
)
