# SPDX-License-Identifier: Apache-2.0
"""Linear layers in bfloat16 on a CPU that cannot multiply it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def fast_products(device: str) -> contextlib.AbstractContextManager[Any]:
    """Makes linear layers in bfloat16 as fast as the device can; for large inputs, as calibration has them.

    Without instructions for bfloat16 (AVX512-BF16, AMX) torch multiplies it on a CPU in plain loops: four times as
    slow as widening the inputs and one layer's weights at a time to float32, of which nothing stays. Either way
    products are summed in float32, and the sum rounded to bfloat16.

    Args:
        device: Where the policy is.
    """
    if torch.device(device).type != "cpu" or multiplies_bfloat16():
        return contextlib.nullcontext()
    return _Float32Linear()


def multiplies_bfloat16() -> bool:
    """Whether torch has bfloat16 products for this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Float32Linear(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and args[0].dtype == torch.bfloat16:
            given = [x if x is None else x.float() for x in (*args, *(kwargs or {}).values())]
            return func(*given).to(torch.bfloat16)
        return func(*args, **(kwargs or {}))
