# SPDX-License-Identifier: Apache-2.0
"""Chooses the weights that a fine-tuning changes, and checks that all others stay as they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clp_ros.checkpoints.layer_keys import LayerKeys
from clp_ros.core.errors import ClpError
from clp_ros.core.settings import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from clp_ros.policies.checkpoint import Checkpoint

Kind = Literal["default", "all", "expert", "last", "lora"]
_KINDS = ("default", "all", "expert", "last=K", "lora=R")


@dataclass(frozen=True)
class TrainableWeights:
    """Which weights of a checkpoint are trained.

    Attributes:
        kind: ``default``: as the checkpoint's config.json says. ``all``: all that lerobot can train. ``expert``: the
            action expert and the projections. ``last``: the last layers of each stack and the output projections.
            ``lora``: adapters of low rank, and nothing else.
        number: K of ``last``, R of ``lora``; otherwise 0.
    """

    kind: Kind
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}={self.number}" if self.number else self.kind

    def arguments(self, checkpoint: Checkpoint) -> list[str]:
        """Returns the options of ``lerobot-train`` for this choice.

        Raises:
            ClpError: The family does not say how to make this choice.
        """
        family = checkpoint.family
        if self.kind == "lora":
            return ["--peft.method_type=LORA", f"--peft.r={self.number}"]
        fields: Mapping[str, bool] = {
            "default": {},
            "all": family.train_all,
            "expert": family.train_expert,
            "last": family.train_all,
        }[self.kind]
        if (self.kind != "default" and not fields) or (self.kind == "last" and not family.output_projections):
            raise ClpError(f"the family {family.name} does not support this choice of weights", where=f"--train {self}")
        return [f"--policy.{name}={str(value).lower()}" for name, value in fields.items()]

    def freeze(self, policy: nn.Module, checkpoint: Checkpoint) -> None:
        """Freezes, for ``last``, all parameters but those of the last layers and the output projections.

        Parameters that lerobot itself has frozen, because the loss does not depend on them, stay frozen.

        Args:
            policy: lerobot's policy, with its own choice of trainable parameters.
            checkpoint: Its checkpoint.

        Raises:
            ClpError: No parameter is left.
        """
        if self.kind != "last":
            return
        # The stacks of a published checkpoint lack the prefix of the names in lerobot's model.
        stacks = checkpoint.family.layer_stacks(checkpoint.config)
        depths = {stack.name: stack.layers for stack in stacks}
        keys = LayerKeys(stacks, checkpoint.path)
        for name, parameter in policy.named_parameters():
            key = keys.split(name)
            if key is None:
                is_trained = name.startswith(checkpoint.family.output_projections)
            else:
                is_trained = key.layer >= depths[key.module] - self.number
            if not is_trained:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ClpError("no weight is left to train", where=f"--train {self}", hint="raise K")


def parse_trainable(text: str) -> TrainableWeights:
    """Parses ``default``, ``all``, ``expert``, ``last=K`` or ``lora=R``.

    Raises:
        ClpError: It is none of them, or K or R is not at least 1.
    """
    match = re.fullmatch(r"(default|all|expert)|(last|lora)=([1-9][0-9]{0,3})", text)
    if match is None:
        raise ClpError(
            f"unknown choice of weights {text!r}",
            where="--train",
            hint=did_you_mean(text, list(_KINDS)) or "use default, all, expert, last=K or lora=R",
        )
    if match[1]:
        return TrainableWeights(match[1])  # type: ignore[arg-type]
    return TrainableWeights(match[2], int(match[3]))  # type: ignore[arg-type]


def frozen_hashes(policy: nn.Module) -> dict[str, str]:
    """Returns a hash of the bytes of every frozen parameter, by name."""
    import torch

    def digest(parameter: torch.Tensor) -> str:
        data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(data.numpy().data).hexdigest()

    return {name: digest(one) for name, one in policy.named_parameters() if not one.requires_grad}


def check_frozen(policy: nn.Module, before: Mapping[str, str]) -> None:
    """Refuses a policy whose frozen parameters are not, bit for bit, what they were.

    Args:
        policy: The trained policy.
        before: :func:`frozen_hashes` of it before the first step.

    Raises:
        ClpError: A frozen parameter has changed, or another set of parameters is frozen.
    """
    after = frozen_hashes(policy)
    changed = [name for name in before if after.get(name) != before[name]]
    changed += [name for name in after if name not in before]
    if changed:
        raise ClpError(
            f"{len(changed)} frozen weights have changed, the first is {changed[0]!r}",
            where="fine-tuning",
            hint="this is an error of the program: report it with the command line",
        )


def count_parameters(policy: nn.Module) -> tuple[int, int]:
    """Returns the number of trained and of all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)


def count_by_part(policy: nn.Module, checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Returns the number of ``trainable`` and of ``total`` parameters of each layer stack, and of the rest
    (``other``)."""
    stacks = checkpoint.family.layer_stacks(checkpoint.config)
    keys = LayerKeys(stacks, checkpoint.path)
    counts = {name: {"trainable": 0, "total": 0} for name in (*(stack.name for stack in stacks), "other")}
    for name, parameter in policy.named_parameters():
        # peft puts its own prefix before the names.
        key = keys.split(name.removeprefix("base_model.model."))
        part = counts["other" if key is None else key.module]
        part["total"] += parameter.numel()
        part["trainable"] += parameter.numel() * parameter.requires_grad
    return counts
