# SPDX-License-Identifier: Apache-2.0
"""Building a model without its weights: parameters that take no memory until a checkpoint's are put in their place."""

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
    """Within the block, parameters of new modules are on the meta device; buffers are real, as are all other tensors.

    accelerate's ``init_empty_weights`` does the same, but makes a new parameter whenever one is registered again, so
    that tied matrices come apart, and leaves a model that moves itself to a device (as lerobot's do) to fail. Here
    ``nn.Module.to`` changes the dtype and leaves the device as it is. Not for several threads at a time.
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
    """Puts stand-ins in the place of a model's parameters: with them it can run, and nothing is computed.

    They are torch's fake tensors: meta tensors that say they are on the CPU. What depends on a weight comes out fake
    too; all else (masks, positions, times) is real, and so decides as always what the model does next. On plain meta
    tensors models fail there, and where they ask which device a tensor is on.
    """
    import torch

    from clp_ros.core.compat.torch import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        named = model.named_parameters(remove_duplicate=False)
        weights = {name: torch.empty_like(parameter, device="cpu") for name, parameter in named}
    assign_weights(model, weights, copy=False)


def assign_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], copy: bool) -> None:
    """Puts tensors in the place of a model's parameters, in the parameters' own dtype.

    Args:
        model: Its parameters are replaced, tied ones under all of their names; its buffers are overwritten.
        weights: By name in the model's state dict. The shapes must fit.
        copy: Whether to copy tensors that have the right dtype already.
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
