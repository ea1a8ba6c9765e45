# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.7 with any number of layers, built from its config alone and loaded strictly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.groot.groot_n1_7 import (
    GR00TN17,
    GR00TN17ActionHead,
    GR00TN17Config,
    Qwen3Backbone,
)
from lerobot.policies.groot.modeling_groot import GrootPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLConfig

from .compat import cosmos_reason2_config, tie_lm_head
from .configuration_clp_groot_n1_7 import ClpGrootN17Config
from .fixed_noise import FixedNoise


class ClpGrootN17Policy(GrootPolicy):
    """LeRobot's GR00T N1.7 policy with the depths and widths of its config."""

    config_class = ClpGrootN17Config
    name = "clp_groot_n1_7"

    def _create_groot_model(self) -> nn.Module:
        # As in LeRobot, all parameters have one dtype; buffers (of rotary embeddings) stay float32.
        dtype = torch.float32 if self.config.model_params_fp32 else torch.bfloat16
        with _default_dtype(dtype):
            model = _Model(_model_config(self.config), _backbone_config(self.config))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, **kwargs: Any) -> ClpGrootN17Policy:
        """Loads a checkpoint, always strictly.

        Args:
            pretrained_name_or_path: Folder or Hub repository.
            **kwargs: As in LeRobot; ``strict`` is ignored.

        Raises:
            RuntimeError: A tensor is missing, unknown to the model, or of another shape.
        """
        # GrootPolicy's method would load NVIDIA's base model for a folder without weights.
        return PreTrainedPolicy.from_pretrained.__func__(cls, pretrained_name_or_path, **kwargs | {"strict": True})

    def predict_action_chunk(self, batch: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As LeRobot's method, with an optional initial noise.

        Args:
            batch: A result of the preprocessor.
            noise: (batch, action_horizon, max_action_dim), the initial noise of the flow; None: it is drawn.
            **kwargs: As in LeRobot.

        Returns:
            (batch, chunk_size, action_size), normalised.
        """
        with nullcontext() if noise is None else FixedNoise(noise):
            return super().predict_action_chunk(batch, **kwargs)


class _Backbone(Qwen3Backbone):
    """LeRobot's backbone, built from a config in memory, which LeRobot does not support."""

    def __init__(self, config: Qwen3VLConfig, **kwargs: Any) -> None:
        self._config = config
        super().__init__(load_pretrained_weights=False, **kwargs)

    def _from_backbone_config(self, *, model_kwargs: dict[str, Any], **_: Any) -> nn.Module:
        return AutoModelForImageTextToText.from_config(self._config, **model_kwargs)


class _Model(GR00TN17):
    """LeRobot's model with this backbone."""

    def __init__(self, config: GR00TN17Config, backbone_config: Qwen3VLConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.config = config
        self.backbone = _Backbone(
            backbone_config,
            tune_llm=config.tune_llm,
            tune_visual=config.tune_visual,
            select_layer=config.select_layer,
            use_flash_attention=config.use_flash_attention,
            tune_top_llm_layers=config.tune_top_llm_layers,
        )
        self.action_head = GR00TN17ActionHead(config)
        self.post_init()
        tie_lm_head(self.backbone.model)


def _model_config(config: ClpGrootN17Config) -> GR00TN17Config:
    """Returns the model's config as LeRobot has it after loading a base model."""
    tuned = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model", "tune_vlln", "tune_top_llm_layers")
    model = GR00TN17Config(**config.model_config, **{name: getattr(config, name) for name in tuned})
    model.use_flash_attention = config.use_flash_attention
    for name in ("num_inference_timesteps", "rtc_ramp_rate"):
        if getattr(config, name) is not None:
            setattr(model, name, getattr(config, name))
    model.select_layer = config.llm_layers
    model.vl_self_attention_cfg["num_layers"] = config.vl_self_attention_layers
    model.diffusion_model_cfg["num_layers"] = config.dit_layers
    return model


def _backbone_config(config: ClpGrootN17Config) -> Qwen3VLConfig:
    backbone = Qwen3VLConfig(**config.backbone_config) if config.backbone_config else cosmos_reason2_config()
    # LeRobot builds all layers of the published model, and then removes the last ones.
    backbone.text_config.num_hidden_layers = config.llm_layers
    return backbone


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
