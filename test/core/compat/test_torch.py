# SPDX-License-Identifier: Apache-2.0
"""torch's private names do what clp_ros needs of them; a new torch that changes one fails here first."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clp_ros.core.compat import torch as compat

pytestmark = pytest.mark.lerobot


def test_fake_tensors_have_a_device_a_shape_and_no_data():
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.empty_like(torch.empty(3, 4, device="meta"), device="cpu")
    assert isinstance(weight, compat.FakeTensor)
    assert weight.device.type == "cpu"
    product = torch.ones(2, 3) @ weight  # a real tensor beside it, outside the mode
    assert isinstance(product, compat.FakeTensor)
    assert product.shape == (2, 4)


def test_what_depends_on_fake_data_raises():
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(3)
    with pytest.raises(compat.DataDependentOutputException):
        fake.sum().item()
    with pytest.raises(compat.DynamicOutputShapeException):
        fake.nonzero()


def test_a_dispatch_mode_sees_every_operation_and_works_with_the_flop_counter():
    seen = []

    class Recording(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FlopCounterMode(display=False) as counter, Recording():
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert torch.ops.aten.mm.default in seen
    assert counter.get_total_flops() == 2 * 2 * 3 * 4


def test_bfloat16_products_are_known_of():
    assert isinstance(compat.multiplies_bfloat16(), bool)


def test_compiled_graphs_are_counted():
    compat.compiled_graphs(reset=True)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert compat.compiled_graphs(reset=True) == 1
    assert compat.compiled_graphs() == 0
