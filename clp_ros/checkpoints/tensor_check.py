# SPDX-License-Identifier: Apache-2.0
"""Checks that a checkpoint's tensors are those of the model that config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    from torch import nn


def check_tensors(
    model: nn.Module, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Checks that every tensor of the model is in the checkpoint, with its shape, and nothing else.

    Args:
        model: The model; its parameters may be on the meta device.
        names: The stored name of each tensor, by its name in the model.
        shapes: The shape of each stored tensor.
        where: The checkpoint, for the error.

    Raises:
        ClpError: A tensor is missing, unknown to the model, or of another shape.
    """
    wanted = model.state_dict(keep_vars=True)
    for name, stored in names.items():
        if name not in wanted:
            raise ClpError(
                f"the model has no tensor {stored!r}",
                where=where,
                hint="give the config.json that was saved with these weights",
            )
        if tuple(wanted[name].shape) != tuple(shapes[stored]):
            raise ClpError(
                f"tensor {stored!r} has shape {tuple(shapes[stored])}, the model's has {tuple(wanted[name].shape)}",
                where=where,
                hint="give the config.json that was saved with these weights",
            )
    # Tied tensors are stored once, but the model lists them under each of their names.
    held = {id(wanted[name]) for name in names}
    missing = [name for name in wanted if id(wanted[name]) not in held]
    if missing:
        raise ClpError(
            f"tensor {missing[0]!r} is missing ({len(missing)} in all)",
            where=where,
            hint="give the config.json that was saved with these weights",
        )
