"""Memory of a training step: counted tensors, and the error of a device that has too little."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from flash.arch import ArchSpec, parse_pattern
from flash.data.corpus import PackedData
from flash.data.tokenizer import load_tokenizer
from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.training import memory
from flash.training.fit import fit
from flash.training.memory import (
    GIB,
    activation_bytes_per_token,
    out_of_memory_named,
    remedy,
    step_memory,
)
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings
from tests.conftest import SMALL
from tests.training.decoders import make_model

RECIPE = RecipeSettings(name="test", tokens=256, batch_size=8)
TRAINER = TrainerSettings(precision=Precision.fp32)
BATCH, LENGTH = 4, 128
WIDE = replace(SMALL, ffn_dim=384, layer_types=parse_pattern("FS-F"), num_heads=4, num_kv_heads=2)


def kept_bytes(spec: ArchSpec, precision: Precision, checkpointing: bool) -> float:
    """Bytes per token that autograd keeps in a forward pass, copies of weights left out."""
    model = Decoder(spec)
    model.checkpoint_layers = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # holds the storages, lest their addresses are used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Copies of weights in half precision, and tables of positions, do not grow with the tokens.
        if storage.data_ptr() not in weights and tensor.shape[0] in {BATCH, BATCH * LENGTH}:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(spec.vocab_size, (BATCH, LENGTH))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16)
    with hooks, half:
        model.hidden(tokens)
    return sum(storage.nbytes() for storage in kept.values()) / tokens.numel()


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("spec", [SMALL, WIDE, replace(WIDE, qk_norm=False)])
def test_activations_are_those_that_autograd_keeps(spec, precision):
    counted = activation_bytes_per_token(spec, precision)
    assert kept_bytes(spec, precision, False) == pytest.approx(counted, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_layers():
    fewer, more = (replace(SMALL, layer_types=parse_pattern("F" * n)) for n in (4, 8))
    kept = [kept_bytes(spec, Precision.fp32, True) for spec in (fewer, more)]
    counted = [
        activation_bytes_per_token(spec, Precision.fp32, checkpointing=True)
        for spec in (fewer, more)
    ]
    assert kept[1] - kept[0] == counted[1] - counted[0] == 4 * 4 * SMALL.model_dim


def test_micro_batch_checkpointing_and_shards_decide_the_memory():
    whole = step_memory(SMALL, RECIPE, TRAINER, 64)
    half = step_memory(SMALL, RECIPE, replace(TRAINER, micro_batch=4), 64)
    assert half.activations == whole.activations // 2
    again = step_memory(SMALL, RECIPE, replace(TRAINER, activation_checkpointing=True), 64)
    assert again.activations < whole.activations / 2
    sharded = replace(TRAINER, strategy=Strategy.fsdp, devices=2)
    assert step_memory(SMALL, RECIPE, sharded, 64).states == whole.states // 2
    assert step_memory(SMALL, RECIPE, TRAINER, 64, teacher=WIDE).total > whole.total


def test_the_remedy_is_the_next_setting_that_halves_the_memory():
    assert remedy(RECIPE, TRAINER).startswith("trainer.micro_batch=4 ")
    odd = replace(RECIPE, batch_size=9)
    assert remedy(odd, TRAINER).startswith("trainer.micro_batch=3 ")
    single = replace(TRAINER, micro_batch=1)
    assert remedy(RECIPE, single).startswith("trainer.activation_checkpointing=true ")
    assert "data.seq_len" in remedy(RECIPE, replace(single, activation_checkpointing=True))


@pytest.fixture
def data(data_settings, backbone_folder, tmp_path) -> PackedData:
    tokenizer = load_tokenizer(backbone_folder / "tokenizer.json")
    return PackedData(data_settings, tokenizer, batch_size=8, seed=0, cache=tmp_path)


def test_a_step_without_memory_names_the_setting_that_halves_it(data, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = make_model()
    monkeypatch.setattr(model, "hidden", exhausted)
    with pytest.raises(InputError) as error:
        fit(model, data, RECIPE, TRAINER, show_progress=False)
    assert re.match(
        r"trainer.micro_batch=8: the CPU has run out of memory \(needed: about .*\); "
        r"trainer.micro_batch=4 at least halves",
        str(error.value),
    )


def test_memory_that_lacks_when_a_run_resumes_is_no_damaged_checkpoint(data, tmp_path, monkeypatch):
    trainer = replace(TRAINER, checkpoint_every_steps=1)
    folder = tmp_path / "checkpoints"
    fit(make_model(), data, RECIPE, replace(trainer, max_steps=1), folder=folder)
    monkeypatch.setattr(torch, "load", lambda *a, **k: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"trainer.micro_batch=8: the CPU has run out of memory"):
        fit(make_model(), data, RECIPE, trainer, folder=folder)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_named(RECIPE, TRAINER):
        raise RuntimeError("shape mismatch")


def test_the_estimate_is_logged_beside_what_the_gpu_has(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    need = step_memory(SMALL, RECIPE, TRAINER, 64)
    memory.log_memory("small", need, RECIPE, TRAINER)
    assert caplog.text == ""  # no GPU, nothing to compare with
    monkeypatch.setattr(memory, "device_memory", lambda trainer: 80 * GIB)
    memory.log_memory("small", need, RECIPE, TRAINER)
    assert "the GPU has 80.0 GiB" in caplog.text
    assert "expected to run out" not in caplog.text
    monkeypatch.setattr(memory, "device_memory", lambda trainer: 1024)
    memory.log_memory("small", need, RECIPE, TRAINER)
    assert "expected to run out of memory; trainer.micro_batch=4 at least halves" in caplog.text
