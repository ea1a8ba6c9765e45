# SPDX-License-Identifier: Apache-2.0
"""Loading that raises where LeRobot's π0 and π0.5 print what is wrong and return a model that is random in part."""

from pathlib import Path
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors.torch import load_file
from torch import nn

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
        weights = load_file(model_file)
        # The published models lack the prefix; their embedding and their language model's head are one matrix.
        if not any(name.startswith(_PREFIX) for name in weights):
            weights = {_PREFIX + name: tensor for name, tensor in weights.items()}
            for absent, present in ((_EMBEDDING, _LM_HEAD), (_LM_HEAD, _EMBEDDING)):
                if absent not in weights and present in weights:
                    weights[absent] = weights[present]
        model.load_state_dict(weights, strict=strict)
        return model
