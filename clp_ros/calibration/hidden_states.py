# SPDX-License-Identifier: Apache-2.0
"""What sums over hidden states take: one finite tensor a layer, all on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clp_ros.core.errors import ClpError

HALF_DTYPES = (torch.bfloat16, torch.float16)


def checked_states(
    hidden: Sequence[torch.Tensor], num_layers: int, name: str, device: torch.device | None, *, copy: bool
) -> tuple[list[torch.Tensor], torch.device]:
    """The hidden states on one device, and that device; refuses what cannot be summed.

    Args:
        hidden: One (tokens, dim) tensor a layer, of any float dtype.
        num_layers: Layers of the module.
        name: The module's name, for the error.
        device: Where the sums live; None before the first.
        copy: Whether they must be copies, for what is kept.

    Raises:
        ClpError: A hidden state holds NaN or infinity; it names the layer.
        ValueError: Wrong number of layers, shapes or dtypes.
    """
    if len(hidden) != num_layers:
        raise ValueError(f"expected {num_layers} hidden states, one a layer, got {len(hidden)}")
    for i, state in enumerate(hidden):
        if state.ndim != 2 or len(state) != len(hidden[0]):
            raise ValueError(f"layer {i}: expected ({len(hidden[0])}, dim), got {tuple(state.shape)}")
        if not state.is_floating_point():
            raise ValueError(f"layer {i}: expected a float dtype, got {state.dtype}")
    if device is None:
        # Apple's mps has no float64.
        device = hidden[0].device if hidden[0].device.type != "mps" else torch.device("cpu")
    states = [state.detach().to(device, copy=copy) for state in hidden]
    layer = first_not_finite(states)
    if layer is not None:
        raise not_finite(name, layer)
    return states, device


def first_not_finite(states: Sequence[torch.Tensor]) -> int | None:
    """Index of the first state that holds NaN or infinity, if any does."""
    # A sum takes a hundredth of isfinite's time on a CPU. One that is not finite may only have been too large.
    sums = torch.stack([x.sum(dtype=torch.float32 if x.dtype in HALF_DTYPES else x.dtype).double() for x in states])
    for layer in (~sums.isfinite()).nonzero().flatten().tolist():
        if not states[layer].isfinite().all():
            return layer
    return None


def not_finite(name: str, layer: int) -> ClpError:
    """The error that a module's hidden state after a layer holds NaN or infinity."""
    return ClpError(
        "hidden state holds NaN or infinity",
        where=f"{name} layer {layer}".strip(),
        fix="calibrate in float32 (half precision overflows), or check the checkpoint's weights",
    )
