"""All model families against transformers on random weights, in both directions and pruned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from flash.arch import ArchSpec, RopeKind, RopeScaling, parse_pattern
from flash.errors import InputError
from flash.interop.hf_folder import write_hf
from flash.model.attention import MaskSpec, attend
from flash.model.backbone import Backbone
from flash.model.checkpoint import build, load, save, state_to_save
from flash.model.decoder import Decoder
from flash.model.families import from_config, to_config
from flash.model.settings import BackboneSettings
from flash.model.weights import read_spec
from flash.prune.importance import Importance, score
from flash.prune.pruning import prune, select
from tests.model.config_variants import random_model
from tests.model.test_decoder import COMMON, assert_same_logits

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": {"model_type": "llama"},
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3-windows": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "ministral": {"model_type": "ministral", "sliding_window": 5},
    "mobilellm-pro": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 96,
        "intermediate_size": 128,
        "moe_layers": [],
        "no_rope_layers": [1, 1, 1],
        "attention_chunk_size": 32,
    },
    "mobilellm-r1": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 96,
        "moe_layers": [],
        "no_rope_layers": [1, 1, 1],
        "layer_types": ["full_attention"] * 3,
        "use_qk_norm": False,
    },
}

PLAIN = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("FFFF"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=97,
    qk_norm=False,
)


def their_model(name: str, tied: bool) -> nn.Module:
    """A model of transformers with random weights, biases and gains."""
    return random_model({**COMMON, "tie_word_embeddings": tied, **CONFIGS[name]})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_their_checkpoint_and_ours_again_give_the_same_logits(name, tied, tmp_path):
    theirs = their_model(name, tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(0, 97, (2, 30))
    expected = theirs(tokens).logits
    assert_same_logits(ours(tokens), expected)
    save(tmp_path / "ours", ours.spec, state_to_save(ours, torch.float32))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(again(tokens).logits, expected)
    assert read_spec(tmp_path / "ours") == ours.spec


def scores(folder: Path) -> Importance:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (2, 12), generator=generator)
    return score(load(folder), [tokens], "x")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_pruned_checkpoint_runs_in_their_class(name, tmp_path):
    their_model(name, True).save_pretrained(tmp_path / "theirs")
    whole = read_spec(tmp_path / "theirs")
    spec = whole.replace(model_dim=32, ffn_dim=64, layer_types=whole.layer_types[:2])
    weights = prune(tmp_path / "theirs", scores(tmp_path / "theirs"), spec)
    ours = build(spec, weights)
    save(tmp_path / "pruned", spec, weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    tokens = torch.randint(0, 97, (2, 30))
    assert_same_logits(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cut_heads_equal_heads_without_output(name, tmp_path):
    """Whatever the order of rotary pairs in the file."""
    their_model(name, True).save_pretrained(tmp_path)
    whole, importance = load(tmp_path), scores(tmp_path)
    spec = whole.spec.replace(num_heads=whole.spec.num_kv_heads)
    assert spec != whole.spec
    pruned = build(spec, prune(tmp_path, importance, spec))
    for heads, layer in zip(select(importance, spec).heads, whole.model.layers, strict=True):
        mask = torch.zeros(whole.spec.num_heads, spec.head_dim).index_fill(0, heads, 1.0)
        layer.self_attn.o_proj.weight.data *= mask.flatten()
    tokens = torch.randint(0, 97, (2, 30))
    assert_same_logits(pruned(tokens), whole(tokens))


@pytest.mark.parametrize("pattern", ["FFF", "FSF", "SSS"])
@torch.no_grad()
def test_heads_that_do_not_divide_the_width_load_in_transformers_too(pattern, tmp_path):
    """As SmolLM2-360M is after pruning; Llama's class refuses such a width."""
    torch.manual_seed(0)
    spec = ArchSpec(
        model_dim=416,
        ffn_dim=32,
        layer_types=parse_pattern(pattern),
        num_heads=15,
        num_kv_heads=5,
        head_dim=32,
        vocab_size=97,
        qk_norm=False,
        sliding_window=5,
    )
    ours = Decoder(spec)
    for parameter in ours.parameters():
        parameter.mul_(3)
    save(tmp_path / "checkpoint", spec, state_to_save(ours, torch.float32))
    write_hf(tmp_path / "hf", ours)
    tokens = torch.randint(0, 97, (2, 30))
    for name in ("checkpoint", "hf"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert_same_logits(theirs(tokens).logits, ours(tokens))
        assert_same_logits(load(tmp_path / name)(tokens), ours(tokens))
        assert read_spec(tmp_path / name) == spec


@torch.no_grad()
def test_a_checkpoint_of_a_former_version_is_read_as_before(tmp_path):
    """It called such a width Llama, and windows without QK-norm our own."""
    for change, model_type in (({"num_heads": 6}, "llama"), ({}, "mobilellm_flash")):
        kinds = parse_pattern("FFFF" if change else "FSF-")
        model = Decoder(PLAIN.replace(**change, layer_types=kinds))
        save(tmp_path / "m", model.spec, state_to_save(model, torch.float32))
        path = tmp_path / "m" / "config.json"
        config = {**json.loads(path.read_text()), "model_type": model_type}
        del config["transformers_version"]
        path.write_text(json.dumps(config))
        again = load(tmp_path / "m")
        assert again.spec == model.spec
        tokens = torch.randint(0, 97, (2, 30))
        assert_same_logits(again(tokens), model(tokens))


@torch.no_grad()
def test_a_head_of_its_own_is_pruned_as_one(tmp_path):
    their_model("llama", True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    head = weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    backbone = Backbone.open(BackboneSettings(name="x", weights=str(tmp_path)))
    assert not backbone.spec.tie_embeddings
    spec = backbone.spec.replace(ffn_dim=64)
    assert torch.equal(prune(tmp_path, scores(tmp_path), spec)["lm_head.weight"], head)
    with pytest.raises(InputError, match=r"lm_head\.weight is not the embedding"):
        build(backbone.spec.replace(tie_embeddings=True), weights)


def test_a_head_that_only_the_weights_of_the_hub_show_is_named(tmp_path, monkeypatch):
    their_model("llama", True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": torch.ones(97, 64)}, path, metadata={"format": "pt"})
    monkeypatch.setattr("flash.model.hub.fetch", lambda *args: tmp_path)
    backbone = Backbone.open(BackboneSettings(name="x", weights="owner/model"))
    with pytest.raises(InputError, match=rf"but the weights have their own; .*{tmp_path}"):
        backbone.fetch()


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json: expected a JSON object"):
        read_spec(tmp_path)
    with pytest.raises(InputError, match=r"model_type=\[\]: expected one of llama"):
        from_config({"model_type": []})


def test_an_adapter_is_refused_rather_than_left_out(tmp_path):
    their_model("llama", True).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config\.json: adapters are not read; merge it"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama-3.1", "mobilellm-pro", "qwen2"])
def test_shards_are_one_file_in_parts(name, tmp_path):
    model = their_model(name, False)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    for key, tensor in one.items():
        assert torch.equal(tensor, many[key]), key
    pruned = [
        prune(
            tmp_path / folder,
            scores(tmp_path / folder),
            read_spec(tmp_path / folder).replace(ffn_dim=32),
        )
        for folder in ("one", "many")
    ]
    for key, tensor in pruned[0].items():
        assert torch.equal(tensor, pruned[1][key]), key


def test_a_missing_or_damaged_shard_is_named(tmp_path):
    their_model("llama", False).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: no such file"):
        load(tmp_path)
    shard.write_bytes(content[:-100])
    with pytest.raises(InputError, match=f"{shard.name}: damaged"):
        load(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    their_model("llama", False).save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    for odd in ({"lm_head.weight": "../elsewhere.safetensors"}, {"x": 5}, {"x": [1]}, {}, [], None):
        both = {**values["weight_map"], **odd} if odd else odd
        index.write_text(json.dumps({**values, "weight_map": both}))
        with pytest.raises(InputError, match="expected files beside it"):
            load(tmp_path)


@torch.no_grad()
def test_a_missing_tensor_is_named_before_anything_is_read(tmp_path):
    their_model("qwen2", True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.k_proj.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    settings = BackboneSettings(name="x", weights=str(tmp_path))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        Backbone.open(settings)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_a_tensor_of_quantized_weights_is_named(kind, tmp_path):
    their_model("llama", True).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name] = weights[name].to(getattr(torch, kind))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor .*up_proj\.weight is of type"):
        Backbone.open(BackboneSettings(name="x", weights=str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_found_wherever_weights_are_read(value, tmp_path):
    their_model("llama", True).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    importance, weights = scores(tmp_path), load_file(path)
    weights[name][3, 2] = value
    save_file(weights, path, metadata={"format": "pt"})
    message = r"model\.safetensors: tensor .*up_proj\.weight has values that are NaN or infinite"
    with pytest.raises(InputError, match=message):
        load(tmp_path)
    with pytest.raises(InputError, match=message):
        prune(tmp_path, importance, read_spec(tmp_path))


def test_an_illegal_architecture_of_a_backbone_is_named_as_it_was_typed():
    settings = BackboneSettings(name="x", arch={**PLAIN.to_dict(), "ffn_dim": 33})
    with pytest.raises(InputError, match=r"^backbone\.arch\.ffn_dim=33: expected a multiple of 32"):
        Backbone.open(settings)
    settings.arch = {**PLAIN.to_dict(), "rope_scaling": {"kind": "linear", "factr": 2.0}}
    with pytest.raises(InputError, match=r"^backbone\.arch\.rope_scaling\.factr: unknown key"):
        Backbone.open(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3_text"}, "gemma3_text: expected one of .*four norms"),
        (
            {"model_type": "mamba"},
            "model_type=mamba: expected one of llama, ministral, qwen3, qwen2",
        ),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: expected silu"),
        ({"attention_bias": True}, "attention_bias=true: expected false"),
        ({"mlp_bias": True}, "mlp_bias=true: expected false"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type=yarn: expected one of default, linear",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            "transformers refuses it: .*llama3.*factor",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            r"^config\.json: rope_scaling\.factor=0\.5: expected a number",
        ),
        ({"hidden_size": 80}, r"^config\.json: hidden_size=80: expected a multiple of 32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: expected 1.0"),
        ({"model_type": "llama4_text"}, "moe_layers=.*expected"),
        ({"model_type": "llama4_text", "moe_layers": []}, "no_rope_layers=.*expected rotary"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(change, message):
    config = {**to_config(PLAIN), **change}
    with pytest.raises(InputError, match=message):
        from_config(config)


def test_rope_scaling_and_biases_round_trip_and_change_no_older_dictionary():
    scaling = RopeScaling(kind=RopeKind.llama3, factor=32.0)
    spec = PLAIN.replace(qkv_bias=True, rope_scaling=scaling)
    assert ArchSpec.from_json(spec.to_json()) == spec
    assert {"qkv_bias", "rope_scaling"} & set(PLAIN.to_dict()) == set()
    with pytest.raises(InputError, match="rope_scaling.factr: unknown key"):
        PLAIN.replace(rope_scaling={"kind": "linear", "factr": 2.0})


@torch.no_grad()
def test_documents_do_not_see_each_other():
    torch.manual_seed(0)
    for pattern in ("FF", "FS", "S-"):
        model = Decoder(PLAIN.replace(layer_types=parse_pattern(pattern), sliding_window=3))
        tokens = torch.randint(0, 97, (2, 12))
        documents = torch.tensor([[0] * 5 + [1] * 7, [4] * 12])
        joined = model.hidden(tokens, documents=documents)
        # Rotary embeddings are relative, so the place of a document does not matter.
        torch.testing.assert_close(joined[:1, 5:], model.hidden(tokens[:1, 5:]))
        torch.testing.assert_close(joined[1:], model.hidden(tokens[1:]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_block_masks_are_the_same_masks():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    documents = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])
    for window, docs in ((7, None), (None, documents), (7, documents)):
        spec = MaskSpec(0, 40, docs, torch.device("cpu"))
        dense, blocks = attend(q, k, v, spec.mask(window)), attend(q, k, v, spec.block_mask(window))
        torch.testing.assert_close(dense, blocks, rtol=1e-5, atol=1e-5)
