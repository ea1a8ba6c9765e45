# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.7 (lerobot 0.6): a Qwen3-VL language model, self-attention over its output, a diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.layer_stack import LayerStack
from clp_ros.checkpoints.local_paths import moved
from clp_ros.core.compat.lerobot import groot_model, link_groot_n1_7_steps
from clp_ros.core.errors import ClpError
from clp_ros.core.json_object import read_json_object
from clp_ros.policies.base import Modality, token_modalities
from clp_ros.policies.family import Config, Family, check_depth
from clp_ros.policies.groot.family import is_nvidia, run_training_graph, word_modalities
from clp_ros.policies.plugin import register_plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from lerobot.policies.pretrained import PreTrainedPolicy

# Folder in which make_checkpoint puts the backbone's tokenizer and image processor, so that no Hub is needed.
PROCESSOR_FOLDER = "vlm_processor"

_TYPE = "clp_groot_n1_7"
_BASE_MODEL = "nvidia/GR00T-N1.7-3B"
_BACKBONE = "nvidia/Cosmos-Reason2-2B"
ENCODE_STEP = "groot_n1_7_vlm_encode_v1"
# Names of the model in NVIDIA's and lerobot's config.json.
_NVIDIA_NAMES = {"gr00tn1d7", "gr00t_n1d7", "gr00t_n1_7"}
# Of the published model: lerobot's GR00T_N1_7_DEFAULTS, and the length of its backbone's deepstack_visual_indexes.
_DEPTHS = {"llm": 16, "vl_self_attention": 4, "dit": 32}
_ATTEND_TEXT_EVERY = 2
_DEEPSTACK = 3
_STACKS = {"vl_self_attention": "vl_self_attention_cfg", "dit": "diffusion_model_cfg"}
# Fields that lerobot takes from its own config, or sets itself, instead of the base model's config.
_NOT_MODEL_FIELDS = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "_name_or_path", "model_name"),
    *("select_layer", "use_flash_attention", "load_bf16"),
    *("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model", "tune_vlln", "tune_top_llm_layers"),
}


def _recognises(config: Config) -> bool:
    if config.get("type") == "groot":
        # lerobot 0.5 writes the same type for N1.5, but always with a tokenizer and without the other field.
        return config.get("tokenizer_assets_repo") is None and "tune_vlln" in config
    return config.get("type") == _TYPE or _is_nvidia(config)


_is_nvidia = partial(is_nvidia, _NVIDIA_NAMES)


def _depths_and_configs(config: Config) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """Returns the depths by layer stack, the model's config without them, and the backbone's config (empty: as
    published)."""
    if config.get("type") == _TYPE:
        depths = {name: config.get(f"{name}_layers", usual) for name, usual in _DEPTHS.items()}
        model, backbone = config.get("model_config") or {}, config.get("backbone_config") or {}
    else:
        base = config if _is_nvidia(config) else _read_config(config.get("base_model_path"), _BASE_MODEL)
        model = {key: value for key, value in base.items() if key not in _NOT_MODEL_FIELDS}
        depths = {"llm": base.get("select_layer", _DEPTHS["llm"])}
        for name, stack in _STACKS.items():
            if stack in model:
                model[stack] = dict(model[stack])
            depths[name] = model.get(stack, {}).pop("num_layers", _DEPTHS[name])
        backbone = _read_config(base.get("model_name"), _BACKBONE)
    for name, layers in depths.items():
        check_depth(layers, f"the number of layers of {name}")
    return depths, model, backbone


def _read_config(name: str | None, published: str) -> dict[str, Any]:
    """Returns the config.json that a config points to, in a folder or the Hub's cache; empty for the published
    model."""
    if name is None or name == published:
        return {}
    path = Path(name, "config.json")
    if not path.is_file():
        raise ClpError(
            f"the model is built from {name}, which is not a local folder",
            where="config.json",
            hint=f"download {name}, and write the path of its folder into the field",
        )
    return read_json_object(path)


def layer_stacks(config: Config) -> tuple[LayerStack, ...]:
    """As :attr:`clp_ros.policies.family.Family.layer_stacks`."""
    depths, model, backbone = _depths_and_configs(config)
    # Checkpoints in NVIDIA's layout lack lerobot's prefix.
    root = "" if _is_nvidia(config) else "_groot_model."
    llm, head = root + "backbone.model.model.language_model", root + "action_head."
    deepstack = len(backbone["vision_config"]["deepstack_visual_indexes"]) if backbone else _DEEPSTACK
    return (
        LayerStack(
            name="llm",
            group="llm",
            layers=depths["llm"],
            layer_prefix=llm + ".layers.{layer}.",
            layers_path=llm + ".layers",
            norm_path=llm + ".norm",
            # Qwen3-VL adds image features to the outputs of the first layers, by layer index. Without one of these
            # layers, the features for the later ones would be added to other layers.
            protected_layers=frozenset(range(min(deepstack, depths["llm"]))),
            # The last image features are added after the last of these layers, and a layer must follow that reads them.
            min_layers=min(deepstack + 1, depths["llm"]),
        ),
        LayerStack(
            name="vl_self_attention",
            group="vl_self_attention",
            layers=depths["vl_self_attention"],
            layer_prefix=head + "vl_self_attention.transformer_blocks.{layer}.",
            layers_path=head + "vl_self_attention.transformer_blocks",
            probe=None,
        ),
        LayerStack(
            name="dit",
            group="dit",
            layers=depths["dit"],
            layer_prefix=head + "model.transformer_blocks.{layer}.",
            layers_path=head + "model.transformer_blocks",
            pattern_period=_period(model),
            probe=None,
        ),
    )


def _period(model: Config) -> int:
    """Returns the period of the diffusion transformer's attention pattern, in blocks.

    Odd blocks attend to the actions. Even blocks of the published model attend to text and image in turn.
    """
    if model.get("use_alternate_vl_dit", True):
        return 2 * model.get("attend_text_every_n_blocks", _ATTEND_TEXT_EVERY)
    dit = model.get("diffusion_model_cfg")
    return 2 if dit is None or dit.get("interleave_self_attention") else 1


def _with_depths(config: Config, depths: Mapping[str, int]) -> dict[str, Any]:
    now, model, backbone = _depths_and_configs(config)
    (llm, *_) = layer_stacks(config)
    if depths["llm"] <= len(llm.protected_layers) < llm.layers:
        raise ClpError(
            f"with {depths['llm']} layers of llm, no layer would read the image features added after the last one",
            where="llm",
            hint=f"leave at least {len(llm.protected_layers) + 1}",
        )
    if _is_nvidia(config):
        stacks = {stack: {**config.get(stack, {}), "num_layers": depths[name]} for name, stack in _STACKS.items()}
        return {**config, "select_layer": depths["llm"], **stacks}
    if dict(depths) == now:
        return dict(config)
    fields = {f"{name}_layers": layers for name, layers in depths.items()}
    return {**config, "type": _TYPE, **fields, "model_config": model, "backbone_config": backbone}


def rewrite_local_paths(documents: Mapping[str, dict[str, Any]], folder: Path, contents: Path) -> None:
    """As :attr:`clp_ros.policies.family.Family.rewrite_local_paths`."""
    # A checkpoint fine-tuned by lerobot has no processor, but points to that of its base checkpoint.
    if not (contents / PROCESSOR_FOLDER).is_dir():
        return
    for step in documents.get("policy_preprocessor.json", {}).get("steps", []):
        if step.get("registry_name") == ENCODE_STEP:
            step["config"]["model_name"] = moved(step["config"]["model_name"], PROCESSOR_FOLDER, folder)


def _build(folder: Path, device: str) -> PreTrainedPolicy:
    from dataclasses import fields

    from lerobot.configs.policies import PreTrainedConfig

    document = read_json_object(folder / "config.json")
    if _is_nvidia(document):
        raise ClpError(
            "a checkpoint in NVIDIA's layout can be pruned, but lerobot runs it only after fine-tuning",
            where=folder,
            hint=f"run `lerobot-train --policy.type=groot --policy.base_model_path={folder} …`",
        )
    _check_processor(folder)
    register_plugin()
    from lerobot_policy_clp.configuration_clp_groot_n1_7 import ClpGrootN17Config
    from lerobot_policy_clp.modeling_clp_groot_n1_7 import ClpGrootN17Policy

    config = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(config, ClpGrootN17Config):
        # lerobot builds the model by loading the base model's weights, if necessary from the Hub.
        depths, model, backbone = _depths_and_configs(document)
        same = {field.name: getattr(config, field.name) for field in fields(config)}
        own = {f"{name}_layers": layers for name, layers in depths.items()}
        config = ClpGrootN17Config(**same, **own, model_config=model, backbone_config=backbone)
    config.device = device
    return ClpGrootN17Policy(config)


def _check_processor(folder: Path) -> None:
    """Refuses a preprocessor that would make lerobot run code chosen by the checkpoint.

    lerobot loads the backbone's tokenizer and image processors with ``trust_remote_code``.

    Raises:
        ClpError: They are neither those of the published backbone, nor in a folder without code.
    """
    files = [folder / name for name in ("policy_preprocessor.json", "policy_postprocessor.json")]
    documents = {path.name: read_json_object(path) for path in files if path.is_file()}
    rewrite_local_paths(documents, folder, folder)
    for path, step in [(folder / name, step) for name in documents for step in documents[name].get("steps", [])]:
        name = step.get("config", {}).get("model_name", _BACKBONE)
        if step.get("registry_name") != ENCODE_STEP or name == _BACKBONE:
            continue
        if not Path(name).is_dir():
            raise ClpError(
                f"lerobot would run code of the Hub repository {name}",
                where=path,
                hint=f"download it, and write the path of its folder into model_name of {ENCODE_STEP}",
            )
        for file in sorted(Path(name).glob("*.json")):
            if "auto_map" in read_json_object(file):
                raise ClpError("lerobot would run the code named in this file", where=file, hint="remove auto_map")


def _link_processors(preprocessor: Any, postprocessor: Any) -> None:
    from lerobot.policies.groot.processor_groot import GrootN17VLMEncodeStep

    # Relative actions are decoded with the state that the preprocessor received.
    link_groot_n1_7_steps(preprocessor, postprocessor)
    for step in preprocessor.steps:
        if isinstance(step, GrootN17VLMEncodeStep):
            _ = step.proc  # loads the tokenizer now instead of with the first observation


def _forward(policy: PreTrainedPolicy, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    import torch

    valid = batch["action_mask"].bool().any(dim=-1)
    if (padded := batch.get("action_is_pad")) is not None:
        valid[:, : padded.shape[1]] &= ~padded
        # As lerobot's preprocessor does with padding.
        batch = batch | {"action": batch["action"] * valid.unsqueeze(-1)}
    run_training_graph(policy, batch, rng, lambda beta, noise_s: (1 - beta) * noise_s)
    # As in lerobot's AlternateVLDiT.
    is_image = batch["input_ids"] == groot_model(policy).backbone.model.config.image_token_id
    words = word_modalities(is_image, batch["attention_mask"] == 1)
    state = torch.ones_like(valid[:, :1])  # one token, before the actions
    dit = token_modalities(torch.cat((state, valid), dim=1), (Modality.STATE, 1), (Modality.ACTION, None))
    return {"llm": words, "vl_self_attention": words, "dit": dit}


FAMILY = Family(
    name="groot_n1_7",
    recognises=_recognises,
    layer_stacks=layer_stacks,
    with_depths=_with_depths,
    rewrite_local_paths=rewrite_local_paths,
    default_ratio={"llm": 7 / 12, "vl_self_attention": 1 / 4, "dit": 8 / 16},
    build=_build,
    forward=_forward,
    synthetic="clp_ros.policies.groot_n1_7.synthetic",
    policy="groot",
    lerobot=">=0.6,<0.7",
    loads=lambda config: not _is_nvidia(config),
    link_processors=_link_processors,
    denoise="_groot_model.action_head.model.forward",
    ignores_padding=False,
    train_all={
        "tune_llm": True,
        "tune_visual": True,
        "tune_projector": True,
        "tune_diffusion_model": True,
        "tune_vlln": True,
    },
    train_expert={"tune_llm": False, "tune_visual": False, "tune_projector": True, "tune_diffusion_model": True},
    output_projections=("_groot_model.action_head.action_decoder.",),
)
