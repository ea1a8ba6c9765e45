# SPDX-License-Identifier: Apache-2.0
"""Helpers for random checkpoints: a tokenizer without a corpus, seeding, layers of different influence."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from clp_ros.checkpoints.layer_stack import LayerStack

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerFast


def byte_level_tokenizer(special_tokens: Mapping[str, str], texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer: it encodes every string, with one token for each byte.

    Args:
        special_tokens: Further special tokens by attribute name, e.g. ``{"image_token": "<image>"}``.
        texts: Their words get one token each.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", *special_tokens.values()]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*names, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        trainer = trainers.BpeTrainer(
            vocab_size=4096, min_frequency=1, special_tokens=names, initial_alphabet=symbols, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(special_tokens),
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds PyTorch's CPU generator in the block, and restores its state afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def vary_layers(policy: nn.Module, stacks: Collection[LayerStack], projections: Sequence[str], seed: int) -> None:
    """Scales each layer's output projections, in place, so that some layers change their input little.

    All layers of a newly initialised stack have similar scores, so that a calibration would find nothing. Here the
    layers of a group share one seeded gain (:func:`layer_gains`). Layers of small gain are redundant; early ones less
    so, because their input is still small.

    Args:
        policy: The policy that holds the stacks.
        stacks: Its layer stacks.
        projections: Names, within a layer, of the matrices whose products the layer adds to its input.
        seed: Seed of the gains.
    """
    import torch

    with torch.no_grad():
        for stack in stacks:
            gains = layer_gains(stack.layers, stack.pattern_period, seed)
            layers = cast("nn.ModuleList", policy.get_submodule(stack.layers_path))
            for layer, gain in zip(layers, gains, strict=True):
                for projection in projections:
                    layer.get_parameter(projection).mul_(gain)


def layer_gains(layers: int, period: int, seed: int) -> list[float]:
    """Gain of each layer's output projections: runs of ``period`` layers share one, drawn log-uniformly."""
    import numpy as np

    rng = np.random.default_rng(seed)
    runs = -(-(layers - 1) // period)
    per_run = np.exp(rng.uniform(np.log(2.0), np.log(80.0), runs))
    # Layer 0 is never removed, so the runs start at layer 1.
    return [1.0, *np.repeat(per_run, period)[: layers - 1].tolist()]


def projection_gains(stacks: Collection[LayerStack], projections: Sequence[str], seed: int) -> dict[str, float]:
    """Returns the gains of :func:`vary_layers` for :func:`draw_tensor`, by tensor name of the output projections."""
    return {
        stack.layer_prefix.format(layer=layer) + projection: gain
        for stack in stacks
        for layer, gain in enumerate(layer_gains(stack.layers, stack.pattern_period, seed))
        for projection in projections
    }


def draw_tensor(
    policy: nn.Module,
    gains: Mapping[str, float],
    seed: int,
    name: str,
    tensor: torch.Tensor,
    *,
    biases: tuple[str, ...] = (".bias",),
    inputs_last_but_one: tuple[str, ...] = (),
) -> None:
    """Fills a tensor of a policy in place with values that depend only on the seed and the tensor's name.

    Args:
        policy: The policy that has the tensor.
        gains: Factors by name; 1 for all others.
        seed: Seed of the values.
        name: Name in the policy's state dict.
        tensor: The tensor to fill.
        biases: Suffixes of the names of biases, which become zero.
        inputs_last_but_one: Suffixes of the names of weights whose input axis is the last but one. In other weights, as
            of linear and convolutional layers, the input axes are all but the first.
    """
    import torch
    from torch import nn

    owner = policy.get_submodule(name.rpartition(".")[0])
    generator = torch.Generator().manual_seed((seed << 32 | zlib.crc32(name.encode())) % 2**63)
    if name.endswith(biases):
        tensor.zero_()
    elif tensor.ndim == 1:
        tensor.fill_(1.0)  # the remaining tensors are norms
    elif isinstance(owner, nn.Embedding):
        tensor.normal_(std=0.02, generator=generator)
    else:
        inputs = tensor.shape[-2] if name.endswith(inputs_last_but_one) else tensor[0].numel()
        bound = inputs**-0.5 * gains.get(name, 1.0)
        tensor.uniform_(-bound, bound, generator=generator)


def write_weights(model: nn.Module, path: Path, fill: Callable[[str, torch.Tensor], None]) -> None:
    """Writes a model's weights as a safetensors file, tensor by tensor, with memory for one tensor at a time.

    Args:
        model: Built within :func:`clp_ros.policies.empty_weights.empty_weights`. One of several tied tensors is stored.
        path: The file.
        fill: ``fill(name, tensor)`` puts the values of a tensor of the model's state dict into it.
    """
    import torch

    from clp_ros.checkpoints.safetensors_header import TensorInfo, encode_header

    # Larger elements first, so that every tensor is aligned to its element size.
    ordered = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: (-item[1].element_size(), item[0]))
    first: dict[int, str] = {}
    stored_as = {name: first.setdefault(id(empty), name) for name, empty in ordered}
    state = {name: empty.detach() for name, empty in ordered if stored_as[name] == name}
    shared = {name: stored for name, stored in stored_as.items() if stored != name}
    tensors = {
        name: TensorInfo(path.name, _safetensors_dtype(empty.dtype), tuple(empty.shape), 0, empty.nbytes)
        for name, empty in state.items()
    }
    with path.open("wb") as file:
        file.write(encode_header(tensors.items(), {"format": "pt", **shared}))
        for name, empty in state.items():
            tensor = torch.empty_like(empty, device="cpu")
            fill(name, tensor)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _safetensors_dtype(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in a safetensors header, such as BF16, by letting the library write a header."""
    import torch
    from safetensors.torch import save

    header = save({"tensor": torch.empty(0, dtype=dtype)})[8:]  # after the length; there is no data
    return json.loads(header)["tensor"]["dtype"]
