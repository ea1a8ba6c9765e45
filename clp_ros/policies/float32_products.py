# SPDX-License-Identifier: Apache-2.0
"""Linear layers in bfloat16 on a CPU that cannot multiply it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from clp_ros.core.compat.torch import multiplies_bfloat16


@contextlib.contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Makes linear layers in bfloat16 as fast as the device can; for large inputs, as calibration has them.

    Without instructions for bfloat16 (AVX512-BF16, AMX) torch multiplies it on a CPU in plain loops: four times as
    slow as widening the inputs and one layer's weights at a time to float32, of which nothing stays. Either way
    products are summed in float32, and the sum rounded to bfloat16.

    Args:
        device: Where the policy is.
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
