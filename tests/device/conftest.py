"""A tiny program and the settings of a device that measures it quickly."""

import pytest
import torch

from flash.arch import ArchSpec, Quantization, parse_pattern
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder

VOCAB = 64
FORMATS = LoweringSettings(quantization=Quantization.fp32, max_context=64, prefill_chunk=8)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    spec = ArchSpec(
        model_dim=64,
        ffn_dim=96,
        layer_types=parse_pattern("F-"),
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=VOCAB,
    )
    model = Decoder(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="session")
def program(model, tmp_path_factory):
    """The model as a file; token 0 ends a text."""
    path = tmp_path_factory.mktemp("device") / "model.pte"
    write(path, lower(model, FORMATS, bos_id=1, eos_ids=[0]))
    return path


@pytest.fixture
def settings():
    return DeviceSettings(
        name="test",
        processes=2,
        warmups=1,
        runs=2,
        reject_ratio=1000.0,
        lowering=LoweringSettings(quantization=Quantization.fp32, max_context=64, prefill_chunk=8),
        workload=Workload(prompts=[20], contexts=[30], decode_tokens=4),
    )
