# SPDX-License-Identifier: Apache-2.0
"""torch's private names, as torch 2.10 and 2.11 have them."""

# Fake tensors say which device they are on and have no data. torch has documented them, but exports them nowhere.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# The documented base class for code that runs at every operation below autograd; torch exports it nowhere else.
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "compiled_graphs",
    "multiplies_bfloat16",
]


def multiplies_bfloat16() -> bool:
    """Whether torch has bfloat16 products for this CPU.

    ``torch.cpu.get_capabilities`` says what the CPU can do, not what oneDNN needs, which differs by architecture.
    """
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compiled_graphs(reset: bool = False) -> int:
    """How many graphs torch.compile has captured in this process since the last reset; for tests.

    The public ``torch._dynamo.explain`` traces anew instead of saying what has been compiled.

    Args:
        reset: Whether to count from 0 again afterwards.
    """
    import torch

    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    if reset:
        counters.clear()
    return graphs
