# SPDX-License-Identifier: Apache-2.0
"""Replaces the noise that a model draws."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FixedNoise(TorchFunctionMode):
    """In the block, ``torch.randn`` returns this noise, because GR00T's methods have no parameter for it."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Returns the noise instead of a draw, which must have its shape."""
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = tuple(kwargs["size"] if "size" in kwargs else args[0])
        if shape != tuple(self.noise.shape):
            raise ValueError(f"the noise has shape {tuple(self.noise.shape)}, but the model draws {shape}")
        return self.noise.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"), copy=True)
