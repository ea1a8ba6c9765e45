# SPDX-License-Identifier: Apache-2.0
"""Noise handed to models that draw it themselves."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FixedNoise(TorchFunctionMode):
    """Within the block, ``torch.randn`` gives this noise: GR00T's methods draw theirs, with no way to hand it in."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hands the noise out in the place of a draw of its shape."""
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = tuple(kwargs["size"] if "size" in kwargs else args[0])
        if shape != tuple(self.noise.shape):
            raise ValueError(f"the noise has shape {tuple(self.noise.shape)}, the model draws {shape}")
        return self.noise.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"), copy=True)
