"""The parity gate passes sound programs and names the stage that changed the logits."""

import json
from dataclasses import replace

import pytest
import torch

from flash.errors import InputError
from flash.lowering.gate import ParityStage, check_parity
from flash.lowering.lower import lower
from flash.lowering.settings import AttentionForm, GateSettings
from flash.model.decoder import Decoder
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


def test_prefill_runs_in_xnnpack(toy, settings):
    """Products, softmax and norms: outside it they would be portable loops, ten times slower."""
    program = read_program(lower(toy("FF"), settings())).program
    [plan] = [plan for plan in program.execution_plan if plan.name == "forward"]
    outside = {operator.name.removeprefix("aten::") for operator in plan.operators}
    assert not outside & {"bmm", "_softmax", "mean", "linear", "mul", "sigmoid", "permute_copy"}
    assert "llama::custom_sdpa" in outside


def test_quantized_program_equals_its_eager_form(toy, settings, text):
    # The sliding layers also cover the additive mask; biases stay beside quantised weights.
    model = toy("SS", qkv_bias=True)
    report = check_parity(model, settings(), text, SHORT)
    quantized, exported, runtime = report.stages
    assert report.passed, report
    assert quantized.kl > 0
    assert exported.error < 1e-5
    assert runtime.kl < 0.1 * quantized.kl
    assert json.loads(json.dumps(report.to_dict()))["first_failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["fp32", "int8da4w"])
def test_int8_cache_program_equals_its_eager_form(toy, settings, text, quantization):
    report = check_parity(toy("FS"), settings(quantization, "int8"), text, SHORT)
    assert report.passed, report


def test_gate_names_the_stage_that_changed_the_answer(toy, settings, text):
    other = toy("-")
    program = lower(other, settings("fp32"))
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)  # after the file was written
    report = check_parity(other, settings("fp32"), text, SHORT, program=program)
    assert report.first_failure is ParityStage.runtime
    assert [r.passed for r in report.stages] == [True, True, False]
    assert "runtime    FAIL " in str(report)


def test_broken_weights_fail_and_do_not_pass_as_nan(toy, settings, text):
    model = toy("-")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    program = lower(toy("-"), settings("fp32"))
    report = check_parity(model, settings("fp32"), text, SHORT, program=program)
    assert report.first_failure is ParityStage.quantized


@pytest.mark.parametrize("embedding_bits", [4, 8])
def test_other_groups_and_embeddings_run_as_in_eager_mode(toy, settings, text, embedding_bits):
    formats = replace(settings(), group_size=64, embedding_bits=embedding_bits)
    model = Decoder(toy("F").spec.replace(ffn_dim=128)).eval()
    report = check_parity(model, formats, text, SHORT)
    assert report.passed, report


def test_short_text_is_an_error(toy, settings, text):
    with pytest.raises(InputError, match="gate.text=10: expected at least 32 tokens"):
        check_parity(toy("F"), settings(), text[:10], SHORT)
