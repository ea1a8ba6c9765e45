# SPDX-License-Identifier: Apache-2.0
"""Loading that raises where LeRobot's π0 and π0.5 print what is wrong and return a model that is random in part."""

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
    """Comes before LeRobot's policy class among the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any) -> Any:
        """Loads a checkpoint; see LeRobot's ``PreTrainedPolicy.from_pretrained``. It is strict whatever is asked for.

        Raises:
            RuntimeError: A tensor is missing, not the model's, or of another shape.
        """
        return PreTrainedPolicy.from_pretrained.__func__(cls, pretrained_name_or_path, **kwargs, strict=True)

    @classmethod
    def _load_as_safetensor(cls, model: nn.Module, model_file: str, map_location: str, strict: bool) -> nn.Module:
        stored = load_file(model_file)
        # LeRobot's own changes to names; where the head of the language model is stored, the embedding is its copy.
        fixed = gemma_names(model, stored)
        weights = {_with_prefix(name): tensor for name, tensor in fixed.items()}
        named = {_with_prefix(name): tensor for name, tensor in stored.items()}
        if _EMBEDDING in named:  # LeRobot would replace a stored embedding if the head came after it in the file
            weights[_EMBEDDING] = named[_EMBEDDING]
        # The published models lack the prefix, and may hold the embedding alone: the two are one matrix there.
        if _EMBEDDING in weights and _LM_HEAD not in weights and not any(name.startswith(_PREFIX) for name in stored):
            weights[_LM_HEAD] = weights[_EMBEDDING]
        model.load_state_dict(weights, strict=strict)
        return model


def _with_prefix(name: str) -> str:
    return name if name.startswith(_PREFIX) else _PREFIX + name
