# SPDX-License-Identifier: Apache-2.0
"""Builds a model whose parameters use no memory until a checkpoint's weights replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from clp_ros.policies.patched import patched

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def empty_weights() -> Iterator[None]:
    """Puts the parameters of modules created in the block on the meta device. Buffers and other tensors are real.

    accelerate's ``init_empty_weights`` does the same, but unties matrices, because it makes a new parameter at each
    registration, and fails for models that move themselves to a device, as lerobot's do. Here ``nn.Module.to`` changes
    the dtype only. Not thread-safe.
    """
    import torch
    from torch import nn
    from torch.utils.weak import WeakIdKeyDictionary

    register, move = nn.Module.register_parameter, nn.Module.to
    emptied: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in emptied:
                emptied[parameter] = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
            parameter = emptied[parameter]
        register(module, name, parameter)

    def stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype | torch.Tensor)]
        return move(module, getattr(given[0], "dtype", given[0])) if given else module

    with patched(nn.Module, register_parameter=register_empty, to=stay):
        yield


def fake_weights(model: nn.Module) -> None:
    """Replaces a model's parameters by fake tensors: the model can run, but nothing is computed.

    PyTorch's fake tensors are meta tensors that report the CPU as their device. Results that depend on a weight are
    fake; all others (masks, positions, times) are real, and control the model's branches as usual. With plain meta
    tensors these branches, and queries of a tensor's device, would fail.
    """
    import torch

    from clp_ros.core.compat.torch import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        named = model.named_parameters(remove_duplicate=False)
        weights = {name: torch.empty_like(parameter, device="cpu") for name, parameter in named}
    assign_weights(model, weights, copy=False)


def assign_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], copy: bool) -> None:
    """Replaces a model's parameters by these tensors, converted to the parameters' dtype.

    Args:
        model: The model. Tied parameters are replaced under all their names; buffers are overwritten.
        weights: Tensors by name in the model's state dict, with the model's shapes.
        copy: Whether to copy tensors that already have the right dtype.
    """
    from torch import nn

    state = model.state_dict(keep_vars=True)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append((module, name))
    for name, tensor in weights.items():
        wanted = state[name]
        if isinstance(wanted, nn.Parameter):
            filled = nn.Parameter(tensor.to(wanted.dtype, copy=copy), requires_grad=wanted.requires_grad)
            for module, attribute in holders[id(wanted)]:
                setattr(module, attribute, filled)
        else:
            wanted.copy_(tensor)
