# SPDX-License-Identifier: Apache-2.0
"""Records the output of every layer of a PyTorch model while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

from clp_ros.checkpoints.layer_stack import LayerStack

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextlib.contextmanager
def recorded_states(model: nn.Module, stacks: Collection[LayerStack]) -> Iterator[dict[str, list[Any]]]:
    """Records the output of every layer in the block: the input of the next layer, or of the norm after the last.

    Args:
        model: The model that holds the stacks.
        stacks: Its layer stacks. If a stack has no ``probe``, the outputs of its layers are recorded.

    Yields:
        By stack, one (batch, tokens, dim) tensor for each layer, in order; None before the layer has run.
    """
    states: dict[str, list[Any]] = {stack.name: [None] * stack.layers for stack in stacks}
    with contextlib.ExitStack() as handles:
        for stack in stacks:
            for handle in _add_hooks(model, stack, states[stack.name]):
                handles.callback(handle.remove)
        yield states


def _add_hooks(model: nn.Module, stack: LayerStack, states: list[Any]) -> Iterator[Any]:
    def keep(index: int, state: torch.Tensor) -> None:
        states[index] = state.detach().clone()  # some models add to this tensor in place later

    def output(index: int) -> Any:
        return lambda _, __, given: keep(index, given[0] if isinstance(given, tuple) else given)

    def first_input(index: int) -> Any:
        return lambda _, inputs: keep(index, inputs[0])

    layers = cast("nn.ModuleList", model.get_submodule(stack.layers_path))
    if stack.probe is None:
        for index, layer in enumerate(layers):
            yield layer.register_forward_hook(output(index))
        return
    probes = [layer.get_submodule(stack.probe) for layer in layers[1:]]
    for index, probe in enumerate([*probes, model.get_submodule(stack.norm_path)]):
        yield probe.register_forward_pre_hook(first_input(index))
