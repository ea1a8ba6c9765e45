# SPDX-License-Identifier: Apache-2.0
"""Checks hidden states before they are summed: one finite tensor for each layer, all on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clp_ros.core.errors import ClpError

HALF_DTYPES = (torch.bfloat16, torch.float16)


def checked_states(
    hidden: Sequence[torch.Tensor], num_layers: int, name: str, device: torch.device | None, *, copy: bool
) -> tuple[list[torch.Tensor], torch.device]:
    """Checks hidden states, and returns them on one device, with that device.

    Args:
        hidden: One (tokens, dim) tensor for each layer, of any float dtype.
        num_layers: Number of layers of the stack.
        name: The layer stack's name, for the error.
        device: Device of the sums; None before the first update.
        copy: Whether to copy the states, because they are kept.

    Raises:
        ClpError: A hidden state holds NaN or infinity. The message names the layer.
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
    """Returns the index of the first state that holds NaN or infinity; None if all are finite."""
    # On a CPU, a sum takes a hundredth of isfinite's time. The sum of finite values may overflow, so isfinite decides.
    sums = torch.stack([x.sum(dtype=torch.float32 if x.dtype in HALF_DTYPES else x.dtype).double() for x in states])
    for layer in (~sums.isfinite()).nonzero().flatten().tolist():
        if not states[layer].isfinite().all():
            return layer
    return None


def not_finite(name: str, layer: int) -> ClpError:
    """Returns the error for a layer whose output holds NaN or infinity."""
    return ClpError(
        "the hidden state holds NaN or infinity",
        where=f"{name} layer {layer}".strip(),
        hint="calibrate in float32 (half precision overflows), or check the checkpoint's weights",
    )
