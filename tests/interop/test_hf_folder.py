"""Logits of the released transformers library on our folders against the decoder's."""

import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flash.arch import RopeKind, RopeScaling
from flash.errors import InputError
from flash.interop.hf_folder import check_hf, write_hf
from flash.lowering.parity_metrics import ParityLimits, compare
from flash.model.checkpoint import load, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer
from tests.model.greedy import generate

LLAMA3 = RopeScaling(kind=RopeKind.llama3, factor=8.0, original_context=32)
LINEAR = RopeScaling(kind=RopeKind.linear, factor=2.0)


def uneven(model):
    """Gains that are not one, so that a norm left out would show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def check_both(folder, model, text):
    """Stock transformers and flash's own loader, both within 1e-4 of the decoder."""
    found = check_hf(folder, model, text)
    assert found.passed, found
    assert found.worst_layer is None
    again = load(folder)
    with torch.no_grad():
        reference, logits = model(text[None])[0], again(text[None])[0]
    ours = compare("flash", reference, logits, text, ParityLimits(max_error=1e-4))
    assert ours.passed, ours
    return again.spec


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["FF", "F-F", "-F-", "--", "FSF", "S-S", "SF-"])
def test_stock_transformers_gives_the_same_logits(toy, text, tmp_path, pattern, tied, qk_norm):
    model = uneven(toy(pattern, qk_norm, tie_embeddings=tied))
    write_hf(tmp_path / "hf", model)
    spec = check_both(tmp_path / "hf", model, text)
    assert all(kind.attends for kind in spec.layer_types)
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not list((tmp_path / "hf").glob("*.py"))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_widths_by_layer_are_filled_up_with_zeros(toy, text, tmp_path, qk_norm):
    model = uneven(toy("F-F", qk_norm, ffn_dim=(96, 32, 64)))
    write_hf(tmp_path / "hf", model)
    assert check_both(tmp_path / "hf", model, text).ffn_dim == 96


@pytest.mark.parametrize(
    ("pattern", "qk_norm", "changes", "model_type"),
    [
        ("F-", False, {}, "llama"),
        ("F-", True, {}, "qwen3"),
        ("F-", False, {"qkv_bias": True}, "qwen2"),
        ("S-", False, {}, "ministral"),
        ("S-", True, {}, "qwen3"),
        # Llama's class refuses a width that is no multiple of the heads.
        ("F-", False, {"num_heads": 6}, "ministral"),
    ],
)
def test_the_plainest_class_that_can_express_it(
    toy, text, tmp_path, pattern, qk_norm, changes, model_type
):
    model = toy(pattern, qk_norm, **{k: v for k, v in changes.items() if k == "qkv_bias"})
    if "num_heads" in changes:
        model = Decoder(model.spec.replace(**changes))
    write_hf(tmp_path / "hf", uneven(model))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == model_type
    check_both(tmp_path / "hf", model, text)


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR])
@pytest.mark.parametrize(("pattern", "qk_norm"), [("F-", False), ("FS", False), ("F-", True)])
def test_rope_scaling_is_theirs_too(toy, text, tmp_path, pattern, qk_norm, scaling):
    model = uneven(toy(pattern, qk_norm, rope_scaling=scaling))
    write_hf(tmp_path / "hf", model)
    assert check_both(tmp_path / "hf", model, text).rope_scaling == scaling


def test_windows_mean_the_same_number_of_positions(toy, text, tmp_path):
    model = uneven(toy("S"))
    write_hf(tmp_path / "hf", model)
    check_both(tmp_path / "hf", model, text)
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    values["sliding_window"] += 1
    config.write_text(json.dumps(values))
    assert not check_hf(tmp_path / "hf", model, text).passed


def test_a_skipped_layer_is_an_attention_of_zeros(toy, tmp_path):
    write_hf(tmp_path / "hf", uneven(toy("F-", False)))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    skipped = {n: w for n, w in weights.items() if n.startswith("model.layers.1.self_attn")}
    assert len(skipped) == 4
    assert all(not weight.any() for weight in skipped.values())
    assert torch.equal(weights["model.layers.1.input_layernorm.weight"], torch.ones(64))


@torch.no_grad()
def test_stock_transformers_writes_the_same_text(toy, text, tmp_path):
    """With a cache, where zeros and windows take other paths than for a whole text."""
    model = uneven(toy("FS-", False))
    write_hf(tmp_path / "hf", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = text[None, :20]
    written = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(written, generate(model, prompt, 20))


def test_bfloat16_where_it_loses_nothing(toy, text, tmp_path):
    model = toy("F-")
    write_hf(tmp_path / "exact", model)
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    write_hf(tmp_path / "short", model)
    weights = load_file(tmp_path / "short" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    check_both(tmp_path / "short", model, text)


def test_auto_tokenizer_reads_the_tokenizer_as_it_is(toy, backbone_folder, tmp_path):
    source = "def f(x):\n    return x + 123  # <|endoftext|>\n\treturn"
    tokenizer = ModelTokenizer.open(backbone_folder / "tokenizer.json")
    ids = tokenizer.encode(source)
    for pattern, qk_norm in (("F-", True), ("F-", False), ("S-", False)):
        folder = tmp_path / f"{pattern}{qk_norm}"
        write_hf(folder, toy(pattern, qk_norm), tokenizer=tokenizer)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(source).input_ids == ids
        assert theirs.eos_token_id == 0
    own = tmp_path / "own"
    own.mkdir()
    shutil.copyfile(tokenizer.path, own / "tokenizer.json")
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "Own"}')
    write_hf(folder, toy("F-"), tokenizer=ModelTokenizer.open(own / "tokenizer.json"))
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Own"


def test_a_qwen2_folder_warns_of_its_tokenizer_class(toy, backbone_folder, tmp_path, caplog):
    """Should `AutoTokenizer` come to heed the file, the warning can go."""
    tokenizer = ModelTokenizer.open(backbone_folder / "tokenizer.json")
    with caplog.at_level(logging.WARNING, "flash"):
        write_hf(tmp_path / "ministral", toy("FS", False), tokenizer=tokenizer)
        assert not caplog.text
        write_hf(tmp_path / "hf", toy("FS", False, qkv_bias=True), tokenizer=tokenizer)
    assert "AutoTokenizer would cut text as Qwen2 does" in caplog.text
    source = "a = 12345\n    b"
    ids = tokenizer.encode(source)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(source).input_ids != ids
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert fast(source).input_ids == ids


def test_what_no_stock_class_expresses_is_refused_before_anything_is_written(toy, tmp_path):
    with pytest.raises(InputError, match=r"arch\.qkv_bias=true: expected false with arch\.qk_norm"):
        write_hf(tmp_path / "hf", toy("F-", qkv_bias=True))
    assert not (tmp_path / "hf").exists()


def test_stock_transformers_refuses_our_own_folder(toy, tmp_path):
    model = toy("F-")
    save(tmp_path / "own", model.spec, state_to_save(model, torch.float32))
    with pytest.raises(ValueError, match="mobilellm_flash"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_failed_check_names_the_first_part_that_differs(toy, text, tmp_path, tensor, part):
    model = uneven(toy("F-F", tie_embeddings=False))
    write_hf(tmp_path / "hf", model)
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    weights[tensor] *= 1.1
    save_file(weights, path, metadata={"format": "pt"})
    found = check_hf(tmp_path / "hf", model, text)
    assert not found.passed
    assert found.worst_layer == part
    assert f"first in {part}" in str(found)
    assert found.kl > 0
    weights[tensor].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    assert check_hf(tmp_path / "hf", model, text).worst_layer == part


def test_texts_that_cannot_be_checked_on_are_refused(toy, text, tmp_path):
    model = toy("F")
    for wrong in (text[:1], text.repeat(200)):
        with pytest.raises(InputError, match=r"check\.text=.*expected 2 to 8192 tokens"):
            check_hf(tmp_path / "absent", model, wrong)


def test_a_comparison_by_hand():
    """Two positions, two tokens; the first predicts token 0 with 3/4, the other side with 1/2."""
    reference = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    other = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).log()
    text = torch.tensor([1, 0])
    found = compare("x", reference, other, text, ParityLimits(max_kl=0.07, min_agreement=0.5))
    assert found.error == pytest.approx(1.0)
    assert found.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    assert found.agreement == 1.0
    assert found.float_loss == pytest.approx(math.log(4 / 3))
    assert found.file_loss == pytest.approx(math.log(2))
    assert found.change_pct == pytest.approx(50.0)
    assert found.tokens == 1
    assert found.passed
    assert found.rule == "kl <= 0.07 and agreement >= 0.5"
    assert not compare("x", reference, other, text, ParityLimits(max_kl=0.06)).passed
    assert not compare("x", reference, other * float("nan"), text, ParityLimits()).passed
    with pytest.raises(InputError, match=r"limits\.max_kl=0"):
        ParityLimits(max_kl=0)
