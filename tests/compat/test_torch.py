"""Contract tests of PyTorch for flash.compat.torch."""

import pytest
import torch
from torch import nn
from torch.export import export

from tests.compat.contract import contract


class Cut(nn.Module):
    """Module that returns the first rows of its first input; the second input is their number."""

    def forward(self, x, count):
        from flash.compat.torch import assume

        length = count.item()
        assume(length >= 1)
        assume(length <= 4)
        return x.narrow(0, 0, length) + 1


def test_bounds_reach_an_export():
    with contract(
        "torch._check",
        "flash.compat.torch.assume",
        "bound the lengths that an exported program meets",
    ):
        program = export(Cut(), (torch.zeros(4, 2), torch.tensor(3)), strict=False)
        bounds = [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()]
        assert (1, 4) in bounds
        with pytest.raises(RuntimeError):
            Cut()(torch.zeros(4, 2), torch.tensor(0))


def test_many_tensors_are_scaled_at_once():
    with contract(
        "torch._foreach_mul_", "flash.compat.torch.scale_in_place", "scale all gradients"
    ):
        from flash.compat.torch import scale_in_place

        tensors = [torch.ones(2), torch.full((3, 1), 2.0)]
        scale_in_place(tensors, 0.5)
        assert [tensor.flatten()[0].item() for tensor in tensors] == [0.5, 1.0]


def test_caches_of_fake_tensors_are_emptied():
    with contract(
        "torch._subclasses.FakeTensorMode.cache_clear or ShapeEnv.fake_tensor_cache",
        "flash.compat.torch.clear_fake_tensor_caches",
        "free the weights of lowered programs",
    ):
        from torch._subclasses import FakeTensorMode

        from flash.compat.torch import clear_fake_tensor_caches

        program = export(Cut(), (torch.zeros(4, 2), torch.tensor(3)), strict=False)
        values = [node.meta.get("val") for node in program.graph.nodes]
        modes = [value.fake_mode for value in values if isinstance(value, torch.Tensor)]
        assert FakeTensorMode.cache
        assert any(mode.shape_env.fake_tensor_cache for mode in modes)
        clear_fake_tensor_caches([program])
        assert not FakeTensorMode.cache
        assert not any(mode.shape_env.fake_tensor_cache for mode in modes)
