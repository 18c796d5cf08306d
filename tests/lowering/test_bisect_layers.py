"""The search for the part that makes a check fail."""

import pytest
import torch

from flash.lowering.bisect_layers import first_layers, locate_failure
from flash.lowering.depth_profile import describe_costs, part_costs
from flash.lowering.gate import ParityStage
from flash.lowering.settings import GateSettings
from flash.rounding.decoder import round_decoder
from flash.rounding.settings import Rounding

SHORT = GateSettings(prefill_tokens=24, decode_tokens=8)


def _costs(model, formats, text, rotate):
    rounded = round_decoder(model, formats.weight_format, Rounding.nearest, rotate=rotate)
    return part_costs(model, rounded, text, rotated=rotate)


@pytest.mark.parametrize(("layer", "rotate"), [(0, False), (2, False), (2, True)])
def test_the_layer_that_quantizes_badly_is_found(toy, settings, text, layer, rotate):
    model = toy("F---")
    with torch.no_grad():  # a few channels so large that 8 bits leave nothing of the others
        mlp = model.model.layers[layer].mlp
        mlp.up_proj.weight[::32] *= 1000
        mlp.down_proj.weight[:, ::32] /= 1000
    costs = _costs(model, settings(), text, rotate)
    assert list(costs) == ["embedding", *(f"layer {i}" for i in range(4)), "head"]
    assert max(costs, key=costs.get) == f"layer {layer}"
    assert describe_costs(costs).startswith(f"layer {layer} alone costs ")


def test_costs_that_no_part_stands_out_of_are_summed_over_the_depth(toy, settings, text):
    costs = dict.fromkeys(["embedding", *(f"layer {i}" for i in range(7)), "head"], 0.1)
    assert describe_costs(costs) == (
        "no part stands out: embedding 11 %, layers 0 to 2 33 %, layers 3 to 5 33 %, layer 6 11 %, "
        "head 11 %"
    )
    model = toy("FF")
    before = {name: id(module) for name, module in model.named_modules()}
    costs = _costs(model, settings(), text, rotate=False)
    assert all(cost > 0 for cost in costs.values())
    assert {name: id(module) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_the_first_layers_of_a_rounded_decoder_compute_what_they_did(toy, settings, text):
    model = toy("FS-")
    rounded = round_decoder(model, settings().weight_format, Rounding.mse, rotate=True)
    part = first_layers(rounded, 2)
    assert part.spec.num_layers == 2
    rounded.model.layers = rounded.model.layers[:2]
    assert torch.equal(part(text[None]), rounded(text[None]))


def test_a_file_of_other_weights_is_told_from_a_bad_lowering(toy, settings, text):
    found = locate_failure(toy("-"), settings("fp32"), text, SHORT, ParityStage.runtime)
    assert found.startswith("no layer")
