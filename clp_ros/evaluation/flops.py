# SPDX-License-Identifier: Apache-2.0
"""Counts a checkpoint's parameters, and the floating point operations of one action chunk."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from clp_ros.core.errors import ClpError

if TYPE_CHECKING:
    from clp_ros.policies.base import Policy
    from clp_ros.policies.lerobot_policy import LeRobotPolicy

# An instruction that fills a tokenizer's 48 tokens, as in the paper's measurements.
INSTRUCTION = "Pick up the yellow block and place it on top of the orange square block. " * 4


def describe(policy: LeRobotPolicy) -> dict[str, Any]:
    """Counts a checkpoint's parameters and operations.

    Args:
        policy: With its weights or without.

    Returns:
        ``path``, ``family``, ``layers``, ``parameters``, ``parameters_tied`` and ``trainable`` (both of these without
        the matrices that the published model ties and lerobot stores separately), ``gflops`` of one chunk, ``bytes`` of
        all files, ``dtype`` (that of most parameters).
    """
    checkpoint, tied = policy.checkpoint, policy.tied
    weights = dict(policy.model.named_parameters())  # shared parameters are listed once
    by_dtype: Counter[str] = Counter()
    for weight in weights.values():
        by_dtype[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    return {
        "path": str(checkpoint.path),
        "family": checkpoint.family.name,
        "layers": checkpoint.layers,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "parameters_tied": sum(weight.numel() for name, weight in weights.items() if name not in tied),
        "trainable": sum(w.numel() for name, w in weights.items() if name not in tied and w.requires_grad),
        "gflops": count_gflops(policy),
        "bytes": checkpoint.nbytes,
        "dtype": by_dtype.most_common(1)[0][0],
    }


def needed_bytes(policy: Policy, train: bool) -> int:
    """Returns the memory of the weights in bytes; for training, with gradients and Adam's two moments. Activations are
    extra.

    Args:
        policy: With its weights or without.
        train: Whether the policy will be trained.
    """
    trained = 3 if train else 0
    return sum(weight.nbytes * (1 + trained * weight.requires_grad) for weight in policy.model.parameters())


def count_gflops(policy: Policy) -> float:
    """Counts the floating point operations of one action chunk, in 10^9 (a multiply and an add are two).

    Args:
        policy: With its weights or without (``load_policy(..., weights=False)``): the count is equal.

    Raises:
        ClpError: The policy has no weights, and its operations depend on their values.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from clp_ros.core.compat.torch import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        TorchDispatchMode,
    )

    aten = torch.ops.aten
    by_index = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

    class _MasksToIndices(TorchDispatchMode):
        """Converts real masks that select from a fake tensor to indices, so that the number of selected elements is
        known."""

        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in by_index and isinstance(args[0], FakeTensor):
                indices: list[Any] = []
                for index in args[1]:
                    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
                    indices += index.nonzero(as_tuple=True) if is_mask else [index]
                args = (args[0], indices, *args[2:])
            return func(*args, **(kwargs or {}))

    batch = policy.batch(**random_observation(policy))
    # The counter ignores the CPU's fused attention and compiled code. Plain attention has the same operations.
    attention, eager = sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), attention, eager, FlopCounterMode(display=False) as counter, _MasksToIndices():
            policy.predict_batch(batch)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ClpError(
            f"the operations of {policy.family_name} depend on its weights, and cannot be counted ({error})",
            where=policy.path,
            hint="count a checkpoint of another family",
        ) from error
    return counter.get_total_flops() / 1e9


def random_observation(policy: Policy) -> dict[str, Any]:
    """Returns arguments of :meth:`Policy.predict_chunk`: seeded noise as images, the mean state, a long instruction."""
    rng = np.random.default_rng(0)
    sizes = policy.camera_sizes
    return {
        "images": {name: rng.integers(0, 256, (*sizes[name], 3), dtype=np.uint8) for name in policy.cameras},
        "state": np.zeros(policy.state_size, dtype=np.float32),
        "task": INSTRUCTION,
    }
