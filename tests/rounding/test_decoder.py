"""Rounding of whole decoders, and its agreement with the fake quantization used in training."""

import pytest
import torch

from flash.compat.torchao import is_quantized
from flash.model.checkpoint import build
from flash.rounding.decoder import begin_by_outputs, round_decoder, round_nearest
from flash.rounding.fake import fake_quantize, head_operands, settle
from flash.rounding.settings import Rounding, WeightFormat
from tests.lowering.conftest import toy_model

WIDE = WeightFormat(group_size=64, embedding_bits=8)


def model_with_gains(**changes):
    model = toy_model("FS-", **{"qkv_bias": True, "ffn_dim": 128, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("weight_format", [WeightFormat(), WIDE])
def test_a_fake_quantized_decoder_is_the_rounded_one(text, rotate, weight_format):
    model = model_with_gains()
    exact = model(text[None])
    rounded = round_decoder(model, weight_format, Rounding.nearest, rotate=rotate)
    expected = rounded(text[None])
    fake_quantize(model, weight_format, rotate=rotate)
    _, weight = head_operands(model, exact[0, :1, :64])
    torch.testing.assert_close(weight, rounded.lm_head.weight.dequantize())
    # The order of a sum may tip an activation over to the next integer; another format or rotation
    # would be as far from this as from the exact logits.
    difference = (model(text[None]) - expected).abs().mean()
    assert difference < 0.06 * (expected - exact).abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("rotate", [False, True])
def test_calibration_loses_less_and_changes_no_input(text, rotate):
    model = model_with_gains()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = model(text[None])

    def loss(method):
        rounded = round_decoder(
            model, WeightFormat(), method, rotate=rotate, calibration=text.view(4, -1)
        )
        matrices = [m for m in rounded.modules() if isinstance(m, torch.nn.Linear)]
        assert all(is_quantized(m.weight) for m in matrices)
        assert rounded.spec == model.spec
        return (rounded(text[None]) - exact).square().mean()

    assert loss(Rounding.gptq) < 0.5 * loss(Rounding.nearest)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("sequences", [1, 2, 3])  # of 4 at a time
def test_calibration_in_chunks_is_calibration_at_once(monkeypatch, text, sequences):
    model = model_with_gains(tie_embeddings=False)
    exact, calibration = model(text[None]), text.view(4, -1)

    def rounded():
        return round_decoder(
            model, WeightFormat(), Rounding.gptq, rotate=True, calibration=calibration
        )

    at_once = rounded()
    monkeypatch.setattr("flash.rounding.decoder.CHUNK_TOKENS", sequences * 16 + 15)
    in_chunks = rounded()
    for name, module in at_once.model.layers[:1].named_modules():
        if isinstance(module, torch.nn.Linear):
            other = in_chunks.model.layers.get_submodule(name)
            assert torch.equal(other.weight.data.qdata, module.weight.data.qdata)
    # Later an activation may tip over to the next integer, as sums have another order.
    losses = [float((m(text[None]) - exact).square().mean()) for m in (at_once, in_chunks)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotate", [False, True])
def test_training_begins_with_the_loss_of_calibration(text, tied, rotate):
    model = model_with_gains() if tied else toy_model("FS-", tie_embeddings=False)
    exact = model(text[None])
    calibration = text.view(4, -1)

    def loss(decoder):
        return (decoder(text[None]) - exact).square().mean()

    rounded = round_decoder(
        model, WeightFormat(), Rounding.gptq, rotate=rotate, calibration=calibration
    )
    scales = begin_by_outputs(model, WeightFormat(), rotate=rotate, calibration=calibration)
    assert ("lm_head" in scales) is not tied
    fake_quantize(model, rotate=rotate, scales=scales)
    for name in scales:
        weight = rounded.get_submodule(name).weight.dequantize()
        torch.testing.assert_close(model.get_submodule(name).rounded_weight(), weight)
    if not tied:  # a tied head is rounded to the nearest, as it stays the embedding
        assert loss(model) < 1.2 * loss(rounded)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("gain", [0.0, 1e-40, -1e-5])  # of a few channels of each norm
def test_settled_weights_are_rounded_as_in_their_training(text, tied, rotate, gain):
    model = model_with_gains(tie_embeddings=tied)
    norms = [
        p for name, p in model.named_parameters() if "layernorm" in name or "model.norm" in name
    ]
    for norm in norms:
        norm[3:6] = gain
    scales = begin_by_outputs(model, WeightFormat(), rotate=rotate, calibration=text.view(4, -1))
    fake_quantize(model, rotate=rotate, scales=scales)
    for parameter in model.parameters():  # as training moves them
        parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    for norm in norms:
        norm[7:9] = gain
    trained = {name: model.get_submodule(name).rounded_weight() for name in scales}
    before = model(text[None])
    settle(model)
    torch.testing.assert_close(model(text[None]), before, atol=0.05 * float(before.std()), rtol=0)
    stored = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    plain = build(model.spec, stored)
    rounded = round_decoder(plain, WeightFormat(), Rounding.nearest, rotate=rotate)
    for name in scales:
        found, weight = rounded.get_submodule(name).weight.dequantize(), trained[name]
        torch.testing.assert_close(found, weight, atol=0.01 * float(weight.std()), rtol=0.02)


def test_what_is_rounded_stays_as_it_is(text):
    model = round_decoder(model_with_gains(), WeightFormat(), Rounding.mse, rotate=True)
    before = model.lm_head.weight.data.qdata.clone()
    round_nearest(model, WeightFormat())
    assert torch.equal(model.lm_head.weight.data.qdata, before)


def test_gradients_pass_through_the_rounding_and_the_tied_weight_stays_one():
    model = toy_model("F-")
    names = [name for name, _ in model.named_parameters()]
    fake_quantize(model)
    fake_quantize(model)  # once is enough
    assert [name for name, _ in model.named_parameters()] == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.randint(0, 96, (2, 9))
    model(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rounding_in_training_knows_no_autocast(text):
    model = toy_model("F")
    fake_quantize(model)
    exact = model.lm_head.rounded_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.lm_head.rounded_weight(), exact)
