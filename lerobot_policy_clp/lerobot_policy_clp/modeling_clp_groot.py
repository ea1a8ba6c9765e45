# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 with any number of layers, built from its config alone and loaded strictly.

``from_pretrained`` of LeRobot 0.5.1 does not work with the version of transformers that it requires: it needs
flash-attn, computes with meta tensors, and initialises the projector between vision and language again after loading
it. Therefore, the model is built here from LeRobot's classes without ``from_pretrained``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.groot.action_head.flow_matching_action_head import (
    FlowmatchingActionHead,
    FlowmatchingActionHeadConfig,
)
from lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl import Eagle25VLForConditionalGeneration
from lerobot.policies.groot.groot_n1 import GR00TN15, EagleBackbone, GR00TN15Config
from lerobot.policies.groot.modeling_groot import GrootPolicy
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM, SiglipVisionModel

from .compat import eagle_config
from .configuration_clp_groot import ClpGrootConfig
from .fixed_noise import FixedNoise

_PREFIX = "_groot_model."  # LeRobot's prefix to NVIDIA's tensor names

# nvidia/GR00T-N1.5-3B's config.json.
_ACTION_HEAD = {
    "action_horizon": 16,
    "add_pos_embed": True,
    "backbone_embedding_dim": 2048,
    "diffusion_model_cfg": {
        "attention_head_dim": 48,
        "cross_attention_dim": 2048,
        "dropout": 0.2,
        "final_dropout": True,
        "interleave_self_attention": True,
        "norm_type": "ada_norm",
        "num_attention_heads": 32,
        "output_dim": 1024,
        "positional_embeddings": None,
    },
    "hidden_size": 1024,
    "input_embedding_dim": 1536,
    "model_dtype": "float32",
    "noise_beta_alpha": 1.5,
    "noise_beta_beta": 1.0,
    "noise_s": 0.999,
    "num_inference_timesteps": 4,
    "num_target_vision_tokens": 32,
    "num_timestep_buckets": 1000,
    "use_vlln": True,
    "vl_self_attention_cfg": {
        "attention_head_dim": 64,
        "dropout": 0.2,
        "final_dropout": True,
        "num_attention_heads": 32,
        "positional_embeddings": None,
    },
}
# Its backbone: SigLIP 2 (400M, 224 pixels) and Qwen3-1.7B, with one linear layer between them.
_EAGLE = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "text_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151680,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "select_layer": -1,
    "force_image_size": 224,
    "image_token_index": 151669,
    "use_pixel_shuffle": False,
    "mlp_connector_layers": 1,
}


class ClpGrootPolicy(GrootPolicy):
    """LeRobot's GR00T N1.5 policy with the depths and widths of its config."""

    config_class = ClpGrootConfig
    name = "clp_groot"

    def _create_groot_model(self) -> nn.Module:
        return _Model(self.config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: ClpGrootConfig | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **_: Any,
    ) -> ClpGrootPolicy:
        """Loads a checkpoint in LeRobot's or NVIDIA's layout, always strictly.

        Args:
            pretrained_name_or_path: Folder or Hub repository.
            config: Its config. For a checkpoint in NVIDIA's layout, the fields that LeRobot adds (cameras, state and
                action) are enough.
            cache_dir, force_download, local_files_only, revision, token: See
                ``huggingface_hub.snapshot_download``.

        Raises:
            RuntimeError: A tensor is missing, unknown to the model, or of another shape.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_name_or_path),
                    allow_patterns=["*.json", "*.safetensors"],
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    revision=revision,
                    token=token,
                )
            )
        published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        prefix = ""
        if "type" not in published:
            config, prefix = _nvidia_config(published, config), _PREFIX
        elif config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        # Without weights at first: many machines lack the memory for two copies, and drawing weights is slow.
        with init_empty_weights(include_buffers=False):
            policy = cls(config)
        dtypes = {name: tensor.dtype for name, tensor in policy.state_dict().items()}
        weights = {
            prefix + name: tensor.to(dtypes.get(prefix + name, tensor.dtype), copy=True)
            for name, tensor in _stored(folder)
        }
        policy.load_state_dict(weights, strict=True, assign=True)
        return policy.to(config.device).eval()

    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """As LeRobot's method, with an optional initial noise.

        Args:
            batch: A result of the preprocessor.
            noise: (batch, chunk_size, max_action_dim), the initial noise of the flow; None: it is drawn.

        Returns:
            (batch, chunk_size, action_size), normalised.
        """
        with nullcontext() if noise is None else FixedNoise(noise):
            return super().predict_action_chunk(batch)


class _Eagle(Eagle25VLForConditionalGeneration):
    """LeRobot's Eagle with a check that the image features fit the image tokens, which LeRobot lacks."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_hidden_states: bool = True,
        return_dict: bool = True,
    ) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        pictures = self.extract_feature(pixel_values).to(embedded.dtype)
        # No boolean index, because fake tensors do not have the number of tokens, which it needs.
        places = (input_ids == self.image_token_index).unsqueeze(-1)
        if int(places.sum()) != pictures.shape[:-1].numel():
            raise ValueError(
                f"{pictures.shape[:-1].numel()} image features do not fit {int(places.sum())} image tokens"
            )
        return self.language_model(
            inputs_embeds=embedded.masked_scatter(places, pictures),
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class _Backbone(EagleBackbone):
    """LeRobot's backbone, built from a config in memory and with PyTorch's attention."""

    def __init__(self, config: ClpGrootConfig) -> None:
        nn.Module.__init__(self)
        eagle = _merged(_EAGLE, config.eagle_config)
        # LeRobot builds all of Qwen3's layers, and then removes the last ones.
        eagle["text_config"]["num_hidden_layers"] = config.llm_layers
        eagle = eagle_config(eagle, attention="sdpa")
        # Both towers are given, because the class would need flash-attn to build one.
        vision, language = SiglipVisionModel(eagle.vision_config), Qwen3ForCausalLM(eagle.text_config)
        self.eagle_model = _Eagle(eagle, vision, language)
        self.eagle_linear = nn.Identity()
        self.select_layer = config.llm_layers
        self.set_trainable_parameters(config.tune_llm, config.tune_visual)


class _Model(GR00TN15):
    """LeRobot's model with this backbone."""

    def __init__(self, config: ClpGrootConfig) -> None:
        head = _action_head_config(config)
        compute_dtype = "bfloat16" if config.use_bf16 else "float32"
        sizes = {"action_horizon": head["action_horizon"], "action_dim": head["action_dim"]}
        PreTrainedModel.__init__(self, GR00TN15Config(**sizes, compute_dtype=compute_dtype))
        self.backbone = _Backbone(config)
        self.action_head = FlowmatchingActionHead(FlowmatchingActionHeadConfig(**head))
        self.action_horizon, self.action_dim = sizes["action_horizon"], sizes["action_dim"]
        self.compute_dtype = compute_dtype
        for parameter in self.parameters():  # buffers (of rotary embeddings) stay float32
            parameter.data = parameter.data.to(getattr(torch, config.dtype))


def _action_head_config(config: ClpGrootConfig) -> dict[str, Any]:
    head = _merged(_ACTION_HEAD, config.action_head_config)
    head["vl_self_attention_cfg"]["num_layers"] = config.vl_self_attention_layers
    head["diffusion_model_cfg"]["num_layers"] = config.dit_layers
    # The processors pad to these sizes.
    head |= {"max_state_dim": config.max_state_dim, "action_dim": config.max_action_dim}
    return head | {"tune_projector": config.tune_projector, "tune_diffusion_model": config.tune_diffusion_model}


def _nvidia_config(published: Mapping[str, Any], config: ClpGrootConfig | None) -> ClpGrootConfig:
    """Returns the given config, or a new one, with the sizes of a checkpoint in NVIDIA's layout."""
    head = dict(published["action_head_cfg"])
    sizes = {
        "llm_layers": published["backbone_cfg"]["select_layer"],
        "vl_self_attention_layers": head["vl_self_attention_cfg"]["num_layers"],
        "dit_layers": head["diffusion_model_cfg"]["num_layers"],
        "max_state_dim": head["max_state_dim"],
        "max_action_dim": head["action_dim"],
        "chunk_size": head["action_horizon"],
        "action_head_config": head,
    }
    if config is None:
        config = ClpGrootConfig()
        # LeRobot requires a camera. The processors determine the actual ones.
        config.input_features = {"observation.images.camera": PolicyFeature(FeatureType.VISUAL, (3, 224, 224))}
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of ``model.safetensors``, or of the shards in the index."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name)


def _merged(published: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a deep copy of ``published`` with the values of ``given``."""
    merged = copy.deepcopy({**published, **given})
    for name in published.keys() & given.keys():
        if isinstance(published[name], dict):
            merged[name] = _merged(published[name], given[name])
    return merged
