"""`lower`: errors, memory, and the bytes it writes; test_modules.py checks the mathematics."""

import copy
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


@pytest.mark.parametrize("quantization", ["fp32", "int8da4w"])
def test_weights_in_bfloat16_give_the_program_of_their_values(toy, settings, quantization):
    narrow = toy("F", qkv_bias=True).bfloat16()
    wide = copy.deepcopy(narrow).float()
    assert lower(narrow, settings(quantization)) == lower(wide, settings(quantization))


def test_float_weights_that_no_one_keeps_are_freed_before_the_passes(toy, settings, monkeypatch):
    models = [toy("F-")]
    weight = weakref.ref(models[0].lm_head.weight)
    left = []
    module = importlib.import_module("flash.lowering.lower")
    monkeypatch.setattr(module, "serialize", lambda *a, **k: left.append(weight()) or b"")
    lower(models.pop(), settings())
    assert left == [None]


def test_quantised_weights_are_freed_before_the_file_is_put_together(toy, settings, monkeypatch):
    module = importlib.import_module("flash.lowering.lower")
    parts_of_file = module.parts_of_file
    counts = []

    def count_weights():
        everything = gc.get_objects()
        tensors = [each for each in everything if type(each) in (torch.Tensor, torch.nn.Parameter)]
        counts.append(sum(each.dtype is torch.int8 for each in tensors))

    class Parts:
        def __init__(self, program):
            count_weights()
            self.parts = parts_of_file(program)

        def __bytes__(self):
            count_weights()
            return bytes(self.parts)

    gc.collect()
    count_weights()
    monkeypatch.setattr(module, "parts_of_file", Parts)
    lower(toy("-"), settings())
    before, lowered, freed = counts
    assert lowered > before
    assert freed == before


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
    before = _alive()
    lower(toy("-"), settings())
    assert _alive() <= before
