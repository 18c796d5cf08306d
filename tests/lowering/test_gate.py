"""The parity gate passes sound programs and names the stage that changed the logits."""

import json
from dataclasses import replace

import pytest
import torch

from flash.errors import InputError
from flash.lowering.gate import ParityStage, _least_seen, check_parity
from flash.lowering.lower import lower
from flash.lowering.rounding_check import check_rounding
from flash.lowering.settings import AttentionForm, GateSettings
from flash.model.decoder import Decoder
from flash.rounding.decoder import round_decoder
from flash.rounding.settings import Rounding
from tests.lowering.conftest import read_program

SHORT = GateSettings(prefill_tokens=24, decode_tokens=8)


@pytest.mark.parametrize(
    ("pattern", "attention"),
    [
        ("FF-", AttentionForm.matmul),  # the last one goes on with one token
        ("FF", AttentionForm.sdpa),
        pytest.param("FS", AttentionForm.matmul, marks=pytest.mark.slow),
    ],
)
def test_fp32_program_equals_the_decoder(toy, settings, text, pattern, attention):
    formats = replace(settings("fp32"), attention=attention)
    report = check_parity(toy(pattern), formats, text, SHORT)
    assert report.passed, report
    assert all(result.error < 1e-5 for result in report.stages)


def test_widths_by_layer_and_few_key_heads_run_as_in_the_decoder(toy, settings, text):
    changes = {"ffn_dim": (64, 160), "num_heads": 2, "num_kv_heads": 1}
    report = check_parity(toy("FF", **changes), settings("fp32"), text, SHORT)
    assert report.passed, report
    assert all(result.error < 1e-5 for result in report.stages)


def test_prefill_runs_in_xnnpack(toy, settings):
    """Products, softmax and norms: outside it they would be portable loops, ten times slower."""
    program = read_program(lower(toy("FF"), settings())).program
    [plan] = [plan for plan in program.execution_plan if plan.name == "forward"]
    outside = {operator.name.removeprefix("aten::") for operator in plan.operators}
    assert not outside & {"bmm", "_softmax", "mean", "linear", "mul", "sigmoid", "permute_copy"}
    assert "llama::custom_sdpa" in outside


def _rounded(model, formats, method=Rounding.mse):
    return round_decoder(model, formats.weight_format, method, rotate=True)


def test_quantized_program_equals_its_eager_form(toy, settings, text):
    # The sliding layers also cover the additive mask; biases stay beside quantised weights.
    model = toy("SS", qkv_bias=True)
    rounded = _rounded(model, settings())
    rounding = check_rounding(model, rounded, [text], SHORT)
    report = check_parity(rounded, settings(), text, SHORT)
    cached, exported, runtime = report.stages
    assert report.passed, report
    assert rounding.kl > 0
    assert exported.error < 1e-5
    assert max(cached.kl, runtime.kl) < 0.1 * rounding.kl
    assert json.loads(json.dumps(report.to_dict()))["first_failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["fp32", "int8da4w"])
def test_int8_cache_program_equals_its_eager_form(toy, settings, text, quantization):
    formats, model = settings(quantization, "int8"), toy("FS")
    if quantization == "int8da4w":
        model = _rounded(model, formats)
    report = check_parity(model, formats, text, SHORT)
    assert report.passed, report


def test_gate_names_the_stage_that_changed_the_answer(toy, settings, text):
    other = toy("-")
    program = lower(other, settings("fp32"))
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)  # after the file was written
    report = check_parity(other, settings("fp32"), text, SHORT, program=program)
    assert report.first_failure is ParityStage.runtime
    assert [r.passed for r in report.stages] == [True, True, False]
    assert "runtime   FAIL " in str(report)


def test_broken_weights_fail_and_do_not_pass_as_nan(toy, settings, text):
    model = toy("-")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    program = lower(toy("-"), settings("fp32"))
    report = check_parity(model, settings("fp32"), text, SHORT, program=program)
    assert report.first_failure is ParityStage.cached


@pytest.mark.parametrize("embedding_bits", [4, 8])
def test_other_groups_and_embeddings_run_as_in_eager_mode(toy, settings, text, embedding_bits):
    formats = replace(settings(), group_size=64, embedding_bits=embedding_bits)
    model = Decoder(toy("F").spec.replace(ffn_dim=128)).eval()
    report = check_parity(_rounded(model, formats), formats, text, SHORT)
    assert report.passed, report


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({}, True),
        ({"max_perplexity_increase_pct": 1e-6}, False),
        ({"max_kl_quantized": 1e-9}, False),
        ({"min_agreement_quantized": 1.0}, False),
    ],
)
def test_rounding_is_judged_by_perplexity_kl_and_choices(toy, settings, text, limits, passed):
    model = toy("F")
    rounded = _rounded(model, settings())
    texts = [text, text.flip(0)]
    check = check_rounding(model, rounded, texts, replace(SHORT, **limits))
    assert check.passed is passed, check
    assert check.change.tokens == 126
    with torch.no_grad():
        pairs = [(t, m) for t in texts for m in (model, rounded)]
        log_probs = [torch.log_softmax(m(t[None, :-1])[0], -1) for t, m in pairs]
    losses = [
        -part.gather(1, t[1:, None])[:, 0]
        for part, t in zip(log_probs, [text, text, texts[1], texts[1]], strict=True)
    ]
    change = torch.cat([losses[1] - losses[0], losses[3] - losses[2]])
    assert check.change.loss - check.change.float_loss == pytest.approx(float(change.mean()))
    assert check.change.se == pytest.approx(float(change.std() / 126**0.5), rel=1e-4)
    assert json.loads(json.dumps(check.to_dict()))["kl"] > 0


@pytest.mark.parametrize(("parameters", "limit"), [(5e6, 15), (135e6, 15), (4e8, 10), (2e9, 6)])
def test_small_models_may_lose_more(parameters, limit):
    assert GateSettings().perplexity_limit(parameters) == limit
    assert replace(SHORT, max_perplexity_increase_pct=2.0).perplexity_limit(parameters) == 2


def test_short_text_is_an_error(toy, settings, text):
    with pytest.raises(InputError, match="text=10: expected at least 32, which gate"):
        check_parity(toy("F"), settings(), text[:10], SHORT)


def test_few_positions_are_judged_with_what_chance_takes():
    assert _least_seen(0.9, 17) == pytest.approx(12 / 17)
    assert 0.88 < _least_seen(0.9, 2044) < 0.9
