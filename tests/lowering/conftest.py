"""Toy decoders with logits that differ, texts and formats for the lowering's tests."""

import os
import warnings
from typing import Any

import pytest
import torch

from flash.arch import ArchSpec, CacheFormat, Quantization, parse_pattern
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder


def toy_model(pattern: str, qk_norm: bool = True, **changes) -> Decoder:
    torch.manual_seed(0)
    shape = {
        "model_dim": 64,
        "ffn_dim": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 96,
        "sliding_window": 10,
        "qk_norm": qk_norm,
    }
    spec = ArchSpec(**{**shape, **changes}, layer_types=parse_pattern(pattern))
    model = Decoder(spec).eval()
    with torch.no_grad():  # larger weights than at the start of training: logits that differ
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at the start of training
                parameter.normal_()
    return model


def read_program(data: bytes) -> Any:
    """Parse a .pte into ExecuTorch's objects."""
    with warnings.catch_warnings(action="ignore"):  # ExecuTorch's at its first import
        from executorch.exir._serialize._program import deserialize_pte_binary

        return deserialize_pte_binary(data)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(int(os.environ.get("FLASH_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def toy():
    return toy_model


@pytest.fixture
def text():
    return torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def settings():
    def make(quantization: str = "int8da4w", cache: str = "fp32") -> LoweringSettings:
        return LoweringSettings(
            quantization=Quantization[quantization],
            cache=CacheFormat[cache],
            max_context=64,
            prefill_chunk=16,
        )

    return make
