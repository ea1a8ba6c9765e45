# SPDX-License-Identifier: Apache-2.0
"""Computes bfloat16 linear layers in float32 on CPUs without bfloat16 instructions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from clp_ros.core.compat.torch import multiplies_bfloat16


@contextlib.contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Makes bfloat16 linear layers as fast as the device allows, for large inputs such as calibration's.

    On a CPU without bfloat16 instructions (AVX512-BF16, AMX), PyTorch multiplies in plain loops. It is four times as
    fast to convert the inputs and one layer's weights at a time to float32. In both cases products are summed in
    float32 and the sum is rounded to bfloat16.

    Args:
        device: The policy's device.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Float32Linear(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.linear and (args or [kwargs["input"]])[0].dtype == torch.bfloat16:
                wide = [x if x is None else x.float() for x in args]
                named = {name: x if x is None else x.float() for name, x in kwargs.items()}
                return func(*wide, **named).to(torch.bfloat16)
            return func(*args, **kwargs)

    if torch.device(device).type != "cpu" or multiplies_bfloat16():
        yield
    else:
        with Float32Linear():
            yield
