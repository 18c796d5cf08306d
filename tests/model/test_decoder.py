"""The decoder against transformers' classes, and its cache against the full forward pass."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flash.arch import ArchSpec, parse_pattern
from flash.errors import InputError
from flash.model.checkpoint import build, load, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.families import from_config, to_config
from flash.model.weights import read_spec
from tests.model.greedy import generate

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that attention and norms matter
}
SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("FFF"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=97,
    sliding_window=5,
    max_context=64,
)


def assert_same_logits(ours, theirs):
    """Assert that fp32 logits agree within 1e-5 of the largest one."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def _theirs(family: str, tied: bool):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=tied)).eval()
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        **COMMON,
        tie_word_embeddings=tied,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=kinds,
    )
    model = Qwen3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # gains of one would hide a missing norm
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_their_checkpoint_in_our_decoder(family, tied, tmp_path):
    theirs = _theirs(family, tied)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens = torch.randint(0, 97, (2, 20))
    assert_same_logits(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("qk_norm", "pattern"), [(False, "FFF"), (True, "FFF"), (True, "FSF")])
@torch.no_grad()
def test_our_checkpoint_in_their_class(qk_norm, pattern, tied, tmp_path):
    torch.manual_seed(0)
    spec = SPEC.replace(qk_norm=qk_norm, tie_embeddings=tied, layer_types=parse_pattern(pattern))
    ours = Decoder(spec)
    for parameter in ours.parameters():
        parameter.data.mul_(3)
    save(tmp_path / "m", spec, state_to_save(ours, torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokens = torch.randint(0, 97, (2, 20))
    assert_same_logits(ours(tokens), theirs(tokens).logits)
    assert read_spec(tmp_path / "m") == spec


def test_stock_transformers_refuses_patterns_that_it_would_build_wrongly(tmp_path):
    spec = SPEC.replace(layer_types=parse_pattern("F-F"))
    save(tmp_path / "m", spec, state_to_save(Decoder(spec), torch.float32))
    with pytest.raises(ValueError, match="mobilellm_flash"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_widths_by_layer_are_read_as_they_were_written(tmp_path):
    spec = SPEC.replace(ffn_dim=(96, 32, 64))
    model = Decoder(spec)
    save(tmp_path / "m", spec, state_to_save(model, torch.float32))
    again = load(tmp_path / "m")
    assert again.spec == spec
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [96, 32, 64]
    with pytest.raises(ValueError, match="mobilellm_flash"):  # and not computed as another model
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    with pytest.raises(InputError, match=r"intermediate_sizes=\[96, 32\]: .* each of 3 layers"):
        from_config(config | {"intermediate_sizes": [96, 32]})


@pytest.mark.parametrize("pattern", ["FFF", "F-F", "FSF", "-SF"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_full_forward_pass(pattern):
    torch.manual_seed(0)
    model = Decoder(SPEC.replace(layer_types=parse_pattern(pattern)))
    for parameter in model.parameters():
        parameter.data.mul_(5)
    prompt = torch.randint(0, 97, (2, 9))
    tokens = generate(model, prompt, 12)
    assert torch.equal(tokens[:, :9], prompt)
    expected = model(tokens[:, :-1])[:, 8:].argmax(-1)
    assert torch.equal(tokens[:, 9:], expected)
    cache = model.empty_cache(2)
    steps = [model(part, cache) for part in tokens.split([9, 1, 4, 7], dim=1)]
    assert_same_logits(torch.cat(steps, 1), model(tokens))


@torch.no_grad()
def test_a_sliding_layer_sees_its_window_and_no_further():
    torch.manual_seed(0)
    model = Decoder(SPEC.replace(layer_types=parse_pattern("S"), sliding_window=4))
    tokens = torch.randint(0, 97, (1, 12))
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 97
    same = torch.isclose(model(tokens), model(other), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True] * 3 + [False] * 4 + [True] * 5


def test_bf16_round_trip_keeps_the_spec_and_the_rounded_weights(tmp_path):
    spec = SPEC.replace(layer_types=parse_pattern("F-S"))
    model = Decoder(spec)
    save(tmp_path / "m", spec, state_to_save(model, torch.bfloat16))
    again = load(tmp_path / "m")
    assert again.spec == spec
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name


def _broken(folder: Path, change: dict) -> dict:
    config = {**to_config(SPEC), **change}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type=gemma3: expected one of llama"),
        (
            {"layer_types": ["full_attention"]},
            r"must be equal to the number of `layer_types` \(1\)",
        ),
    ],
)
def test_configs_that_cannot_be_expressed_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        from_config(_broken(tmp_path, change))


def test_wrong_tensors_are_named():
    weights = state_to_save(Decoder(SPEC), torch.float32)
    missing = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        build(SPEC, missing)
    with pytest.raises(InputError, match="has shape"):
        build(SPEC.replace(ffn_dim=64), weights)
    with pytest.raises(InputError, match="does not belong"):
        build(SPEC, {**weights, "extra": torch.zeros(1)})


def test_an_interrupted_save_keeps_the_old_folder(tmp_path, monkeypatch):
    spec, folder = SPEC, tmp_path / "m"
    weights = state_to_save(Decoder(spec), torch.float32)
    save(folder, spec, weights)
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flash.model.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(folder, spec, {name: w + 1 for name, w in weights.items()})
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_kill_between_both_moves_of_a_save_loses_nothing(tmp_path, monkeypatch):
    folder, weights = tmp_path / "m", state_to_save(Decoder(SPEC), torch.float32)
    save(folder, SPEC, weights)
    before = (folder / "model.safetensors").read_bytes()
    rename = Path.rename

    def killed(path, target):
        if target == folder:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(folder, SPEC, weights)
    assert (tmp_path / ".m.old" / "model.safetensors").read_bytes() == before
    save(folder, SPEC, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_files_of_a_checkpoint_can_be_read_by_others(tmp_path):
    save(tmp_path / "saved", SPEC, state_to_save(Decoder(SPEC), torch.bfloat16))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()}
    assert modes == {"config.json": 0o644, "model.safetensors": 0o644}
