"""Rotations are orthogonal, exact in float, and spread outliers."""

import pytest
import torch

from flash.rounding.decoder import turn_decoder
from flash.rounding.rotation import orthogonal, turns
from tests.lowering.conftest import toy_model

HADAMARD = [32, 64, 96, 192, 320, 576, 640, 960, 1280, 1536, 2048, 2304]
OTHERS = [1376, 1888]  # no construction that is known here


@pytest.mark.parametrize("width", HADAMARD + OTHERS)
def test_the_matrix_is_orthogonal_and_as_flat_as_can_be(width):
    q = orthogonal(width)
    matrix = q.turn(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    if width in HADAMARD:
        assert matrix.abs().max() * width**0.5 == pytest.approx(1, abs=1e-5)
    x = torch.randn(3, 2 * width)
    torch.testing.assert_close(q.turn_back(q.turn(x)), x)
    torch.testing.assert_close(q.turn(x)[:, :width], x[:, :width] @ matrix.float())


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},  # tied, with QK-norm
        {"tie_embeddings": False, "qk_norm": False},
        {"qkv_bias": True, "num_kv_heads": 4},
        {"model_dim": OTHERS[0]},
    ],
)
def test_a_turned_decoder_has_the_same_logits(changes):
    model = toy_model("F-S", **changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(-0.5, 2)
    model.model.norm.weight[3] = 0  # a channel that nothing reads
    tokens = torch.randint(0, 96, (2, 30))
    before, after = model(tokens), turn_decoder(model)(tokens)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert not torch.allclose(model.model.embed_tokens.weight, turn_decoder(model).lm_head.weight)


@torch.no_grad()
def test_a_turn_goes_back():
    model = toy_model("F", tie_embeddings=False)
    for name, turn in turns(model).items():
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(turn.inverse(turn(weight)), weight, atol=1e-5, rtol=1e-5)


def test_an_outlier_is_spread_over_all_channels():
    x = torch.zeros(1, 576)
    x[0, 17] = 1
    assert orthogonal(576).turn(x).abs().max() == pytest.approx(576**-0.5, rel=1e-5)


def test_gradients_pass_through_a_turn_to_matrix_and_gain():
    model = toy_model("F")
    turn = turns(model)["model.layers.0.mlp.up_proj"]
    weight = model.model.layers[0].mlp.up_proj.weight
    turn(weight).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    assert model.model.layers[0].post_attention_layernorm.weight.grad.abs().sum() > 0
