"""Fixtures of the rounding's tests."""

import pytest
import torch


@pytest.fixture
def text():
    return torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(1))
