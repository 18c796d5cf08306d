"""`lower`: errors, memory, and the bytes it writes; test_modules.py checks the mathematics."""

import gc
import importlib
import weakref

import pytest
import torch

from flash.errors import InputError
from flash.lowering.lower import lower, quantized_module, write
from flash.lowering.settings import LoweringSettings


def test_lowering_leaves_the_decoder_as_it_was(toy, settings):
    model = toy("F-")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = quantized_module(model, settings())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_float_weights_that_no_one_keeps_are_freed_before_the_passes(toy, settings, monkeypatch):
    models = [toy("F-")]
    weight = weakref.ref(models[0].lm_head.weight)
    left = []
    module = importlib.import_module("flash.lowering.lower")
    monkeypatch.setattr(module, "serialize", lambda *a, **k: left.append(weight()) or b"")
    lower(models.pop(), settings())
    assert left == [None]


def test_context_beyond_the_architecture_is_an_error(toy):
    with pytest.raises(InputError, match=r"lowering.max_context=9000: expected at most"):
        lower(toy("F"), LoweringSettings(max_context=9000))


def test_write_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "new" / "model.pte"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["model.pte"]


def _alive() -> int:
    gc.collect()
    return sum(type(each).__name__ == "LoweredBackendModule" for each in gc.get_objects())


def test_programs_of_earlier_lowerings_are_freed(toy, settings):
    lower(toy("-"), settings())
    first = _alive()  # ExecuTorch logs why a node was not delegated and keeps that node's program
    for _ in range(2):
        lower(toy("-"), settings())
    assert _alive() == first
