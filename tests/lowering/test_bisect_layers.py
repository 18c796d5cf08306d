"""The search for the layer that makes the parity gate fail."""

import pytest
import torch

from flash.lowering.bisect_layers import locate_failure
from flash.lowering.gate import ParityStage, check_parity
from flash.lowering.settings import GateSettings

SHORT = GateSettings(prefill_tokens=24, decode_tokens=8)


@pytest.mark.parametrize(
    ("layer", "where"), [(0, "layer 0, the embedding or the head"), (2, "layer 2")]
)
def test_the_layer_that_quantizes_badly_is_found(toy, settings, text, layer, where):
    model = toy("F---")
    with torch.no_grad():  # a few channels so large that 8 bits leave nothing of the others
        model.model.layers[layer].mlp.up_proj.weight[::32] *= 100
    # Without them 0.008.
    strict = GateSettings(prefill_tokens=24, decode_tokens=8, max_kl_quantized=0.012)
    report = check_parity(model, settings(), text, strict, last_stage=ParityStage.quantized)
    assert report.first_failure is ParityStage.quantized
    assert locate_failure(model, settings(), text, strict, ParityStage.quantized) == where


def test_a_file_of_other_weights_is_told_from_a_bad_lowering(toy, settings, text):
    found = locate_failure(toy("-"), settings("fp32"), text, SHORT, ParityStage.runtime)
    assert found.startswith("no layer")
