# SPDX-License-Identifier: Apache-2.0
"""Strict loading for π0 and π0.5: LeRobot only prints a fault, and returns a model with some random weights."""

from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors.torch import load_file
from torch import nn

from .compat import gemma_names

_PREFIX = "model."
_LM_HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
_EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


class StrictGemma:
    """A mixin with strict loading, to be listed before LeRobot's policy class among the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any) -> Any:
        """Loads a checkpoint as LeRobot's ``PreTrainedPolicy.from_pretrained``, but always strictly.

        Raises:
            RuntimeError: A tensor is missing, unknown to the model, or of another shape.
        """
        return PreTrainedPolicy.from_pretrained.__func__(cls, pretrained_name_or_path, **kwargs, strict=True)

    @classmethod
    def _load_as_safetensor(cls, model: nn.Module, model_file: str, map_location: str, strict: bool) -> nn.Module:
        stored = load_file(model_file)
        # LeRobot renames tensors, and copies the head of the language model, if it is stored, to the embedding.
        fixed = gemma_names(model, stored)
        weights = {_with_prefix(name): tensor for name, tensor in fixed.items()}
        named = {_with_prefix(name): tensor for name, tensor in stored.items()}
        if _EMBEDDING in named:  # otherwise LeRobot would replace it by a head that comes after it in the file
            weights[_EMBEDDING] = named[_EMBEDDING]
        # The published models have no prefix, and may store only the embedding, which is tied to the head.
        if _EMBEDDING in weights and _LM_HEAD not in weights and not any(name.startswith(_PREFIX) for name in stored):
            weights[_LM_HEAD] = weights[_EMBEDDING]
        model.load_state_dict(weights, strict=strict)
        return model


def _with_prefix(name: str) -> str:
    return name if name.startswith(_PREFIX) else _PREFIX + name
