# SPDX-License-Identifier: Apache-2.0
"""Config fields for the sizes of π0 and π0.5, which are constants in LeRobot's code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any


@dataclass
class GemmaSizes:
    """Fields for a config of LeRobot's π0 or π0.5. None means LeRobot's value.

    Attributes:
        num_layers: Layers of the VLM, and of the action expert. Their attention is joint in each layer.
        vlm_width, vlm_mlp_dim: Hidden size and feed-forward size of the VLM's language model.
        expert_width, expert_mlp_dim: Those of the action expert.
        head_dim: Width of an attention head, in both. There are 8 of them.
        vocab_size: Rows of the embedding and of the language model heads.
        vision_layers, vision_width, vision_mlp_dim, vision_heads: Sizes of the vision tower.
    """

    num_layers: int = 18
    vlm_width: int | None = None
    vlm_mlp_dim: int | None = None
    expert_width: int | None = None
    expert_mlp_dim: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    vision_layers: int | None = None
    vision_width: int | None = None
    vision_mlp_dim: int | None = None
    vision_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}; it must be at least 1")
        for size in fields(GemmaSizes):
            if (value := getattr(self, size.name)) is not None and value < 1:
                raise ValueError(f"{size.name} is {value}; it must be at least 1")


@contextmanager
def sized(modeling: ModuleType, config: Any) -> Iterator[None]:
    """In the block, LeRobot's constructor uses the config's sizes instead of the constants in its code.

    Not thread-safe.

    Args:
        modeling: LeRobot's ``modeling_pi0`` or ``modeling_pi05``. Some of its names are replaced in the block.
        config: A LeRobot config with the fields of :class:`GemmaSizes`.
    """
    names = ("get_gemma_config", "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    stock = {name: getattr(modeling, name) for name in names}
    variants = config.paligemma_variant, config.action_expert_variant

    def get_gemma_config(tower: str) -> Any:
        sizes = stock["get_gemma_config"](variants[("vlm", "expert").index(tower)])
        sizes.depth = config.num_layers
        mlp_dim = getattr(config, f"{tower}_mlp_dim")
        _set(sizes, width=getattr(config, f"{tower}_width"), mlp_dim=mlp_dim, head_dim=config.head_dim)
        return sizes

    # LeRobot calls the two classes with config=…
    def paligemma(**given: Any) -> Any:
        _set(given["config"].text_config, vocab_size=config.vocab_size)
        _set(
            given["config"].vision_config,
            projection_dim=config.vlm_width,
            num_hidden_layers=config.vision_layers,
            hidden_size=config.vision_width,
            intermediate_size=config.vision_mlp_dim,
            num_attention_heads=config.vision_heads,
        )
        return stock["PaliGemmaForConditionalGenerationWithPiGemma"](**given)

    def expert(**given: Any) -> Any:
        _set(given["config"], vocab_size=config.vocab_size)
        return stock["PiGemmaForCausalLM"](**given)

    try:
        for name, function in zip(names, (get_gemma_config, paligemma, expert), strict=True):
            setattr(modeling, name, function)
        # LeRobot asks for a tower's sizes by the name of its variant, and both towers may have the same variant.
        config.paligemma_variant, config.action_expert_variant = "vlm", "expert"
        yield
    finally:
        config.paligemma_variant, config.action_expert_variant = variants
        for name, function in stock.items():
            setattr(modeling, name, function)


def _set(target: Any, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            setattr(target, name, value)
