"""The device of the tests that need a GPU.

With the environment variable `FLASH_GPU_DRY_RUN` they run on the CPU instead, which proves nothing
about a GPU but that the tests themselves work.
"""

import os
from pathlib import Path

import pytest
import torch

from flash.training.settings import Precision, TrainerSettings


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not os.environ.get("FLASH_GPU_DRY_RUN"):
        pytest.skip("no GPU is at hand")
    return torch.device("cpu")


@pytest.fixture
def trainer(device) -> TrainerSettings:
    """One device in float32, without TensorFloat-32 that would hide differences."""
    torch.backends.cuda.matmul.allow_tf32 = False
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return TrainerSettings(accelerator=accelerator, precision=Precision.fp32)
