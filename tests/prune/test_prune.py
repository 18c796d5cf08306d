"""The prune operator against the backbone with masked channels and layers."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash.arch import ArchSpec, Attention, parse_pattern
from flash.errors import InputError
from flash.model.checkpoint import build, load, save, state_to_save
from flash.model.decoder import Decoder
from flash.prune.importance import Importance, cached_scores, fingerprint, score
from flash.prune.pruning import prune, select

SPEC = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("FFFF"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=97,
    norm_eps=1e-12,  # the width equality below holds up to epsilon
)


@pytest.fixture
def backbone(tmp_path: Path) -> tuple[Path, Decoder, Importance, Tensor]:
    torch.manual_seed(0)
    model = Decoder(SPEC)
    folder = tmp_path / "backbone"
    save(folder, SPEC, state_to_save(model, torch.float32))
    tokens = torch.randint(0, SPEC.vocab_size, (3, 20))
    return folder, model, score(model, [tokens], fingerprint(folder)), tokens


def test_identity_spec_reproduces_the_backbone_bit_for_bit(backbone):
    folder, model, importance, _ = backbone
    weights = prune(folder, importance, SPEC)
    original = load(folder).state_dict()
    assert set(weights) | {"lm_head.weight"} == set(original)
    for name, tensor in weights.items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize("ffn_dim", [32, (32, 96, 64, 32)])
def test_pruned_ffn_equals_masked_ffn(backbone, ffn_dim):
    folder, model, importance, tokens = backbone
    spec = SPEC.replace(ffn_dim=ffn_dim)
    pruned = build(spec, prune(folder, importance, spec))
    selection = select(importance, spec)
    assert tuple(map(len, selection.ffn)) == spec.ffn_dims
    for i, layer in enumerate(model.model.layers):
        mask = torch.zeros(SPEC.ffn_dim).index_fill(0, selection.ffn[i], 1.0)
        layer.mlp.down_proj.weight.data *= mask
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_pruned_heads_equal_heads_without_output(backbone):
    folder, model, importance, tokens = backbone
    spec = SPEC.replace(num_heads=2)  # one of two query heads for each key head
    pruned = build(spec, prune(folder, importance, spec))
    kept = select(importance, spec).heads
    assert [sorted(h // 2 for h in heads) for heads in kept.tolist()] == [[0, 1]] * 4
    for heads, layer in zip(kept, model.model.layers, strict=True):
        mask = torch.zeros(4, 16).index_fill(0, heads, 1.0).flatten()
        layer.self_attn.o_proj.weight.data *= mask
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_merged_key_heads_equal_a_backbone_with_their_mean(backbone):
    folder, model, importance, tokens = backbone
    spec = SPEC.replace(num_kv_heads=1)
    pruned = build(spec, prune(folder, importance, spec))
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            mean = projection.weight.data.view(2, 16, -1).mean(dim=0)
            projection.weight.data = mean.repeat(2, 1)
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_pruned_layers_equal_bypassed_layers(backbone):
    folder, model, importance, tokens = backbone
    spec = SPEC.replace(layer_types=parse_pattern("FF"))
    pruned = build(spec, prune(folder, importance, spec))
    keep = select(importance, spec).layers.tolist()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_skipped_attention_equals_zeroed_output_projection(backbone):
    folder, model, importance, tokens = backbone
    kinds = (Attention.full_attention, Attention.skip_attention) * 2
    spec = SPEC.replace(layer_types=kinds)
    pruned = build(spec, prune(folder, importance, spec))
    for layer, kind in zip(model.model.layers, kinds, strict=True):
        if kind is Attention.skip_attention:
            layer.self_attn.o_proj.weight.data.zero_()
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_pruned_width_equals_masked_width_up_to_the_norms_mean(backbone):
    """The correction for RMSNorm, which divides by a mean over d channels before and d' after.

    With the other channels zero both see the same sum of squares, so each norm of the pruned model
    gives sqrt(d'/d) times the masked one's. Gains scaled by sqrt(d/d') make them equal.
    """
    folder, model, importance, tokens = backbone
    spec = SPEC.replace(model_dim=32)
    pruned = build(spec, prune(folder, importance, spec))
    mask = torch.zeros(SPEC.model_dim).index_fill(0, select(importance, spec).model, 1.0)
    model.model.embed_tokens.weight.data *= mask
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= mask[:, None]
        layer.mlp.down_proj.weight.data *= mask[:, None]
    ratio = math.sqrt(SPEC.model_dim / spec.model_dim)
    for name, parameter in pruned.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            parameter.data *= ratio
    torch.testing.assert_close(pruned(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_tied_candidate_of_an_untied_backbone_inherits_the_input_embedding(tmp_path):
    torch.manual_seed(0)
    untied = SPEC.replace(tie_embeddings=False)
    model = Decoder(untied)
    save(tmp_path / "b", untied, state_to_save(model, torch.float32))
    importance = score(model, [torch.randint(0, 97, (2, 8))], "x")
    pruned = build(SPEC, prune(tmp_path / "b", importance, SPEC))
    assert torch.equal(pruned.lm_head.weight, model.model.embed_tokens.weight)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_scores_do_not_depend_on_how_the_text_is_batched(backbone):
    _, model, _, tokens = backbone
    whole = score(model, [tokens], "x")
    parts = score(model, tokens.split(1), "x")
    assert whole.tokens == parts.tokens == tokens.numel()
    torch.testing.assert_close(whole.ffn, parts.ffn)
    torch.testing.assert_close(whole.model, parts.model)
    torch.testing.assert_close(whole.layers, parts.layers)
    torch.testing.assert_close(whole.heads, parts.heads)


def test_scores_match_the_definition(backbone):
    _, model, importance, tokens = backbone
    layer, seen = model.model.layers[1], {}
    layer.register_forward_hook(lambda m, args, out: seen.update(before=args[0], after=out[0]))
    layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(heads=args[0]))
    model(tokens)
    cosine = torch.nn.functional.cosine_similarity(seen["before"], seen["after"], dim=-1)
    torch.testing.assert_close(importance.layers[1], 1 - cosine.mean())
    torch.testing.assert_close(importance.ffn[1], seen["hidden"].abs().mean(dim=(0, 1)))
    heads = seen["heads"].abs().unflatten(-1, (4, 16)).mean(dim=(0, 1, 3))
    torch.testing.assert_close(importance.heads[1], heads)


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: {**scores, "ffn": scores["ffn"][:, :-1].contiguous()},
        lambda scores: {**scores, "ffn": scores["ffn"].half()},
        lambda scores: {**scores, "model": scores["model"] * torch.nan},
        lambda scores: {**scores, "layers": scores["layers"][:0]},
        lambda scores: {"ffn": scores["ffn"]},
    ],
)
def test_scores_of_other_shapes_and_values_are_computed_again(change, backbone, tmp_path, caplog):
    folder, model, _, tokens = backbone
    path = tmp_path / "scores.safetensors"
    args = (path, folder, lambda: model, [tokens], 1)
    first = cached_scores(*args)
    about = json.dumps({"tokens": first.tokens, "backbone": first.backbone})
    save_file(change(load_file(path)), path, {"importance": about})  # as former versions wrote
    assert cached_scores(*args).digest == first.digest
    assert f"{path}: " in caplog.text
    assert "computed again" in caplog.text


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: whole[:-9] + bytes(9)])
def test_damaged_scores_are_computed_again(damage, backbone, tmp_path, caplog):
    folder, model, _, tokens = backbone
    path = tmp_path / "scores.safetensors"
    args = (path, folder, lambda: model, [tokens], 1)
    first = cached_scores(*args)
    path.write_bytes(damage(path.read_bytes()))
    assert cached_scores(*args).digest == first.digest
    assert Importance.read(path).digest == first.digest
    assert "computed again" in caplog.text


def test_scores_survive_a_round_trip(backbone, tmp_path):
    _, _, importance, _ = backbone
    importance.write(tmp_path / "scores.safetensors")
    again = Importance.read(tmp_path / "scores.safetensors")
    assert again.digest == importance.digest
    assert (again.tokens, again.backbone) == (importance.tokens, importance.backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dim": 128}, r"arch\.model_dim=128: expected at most the backbone's 64"),
        ({"ffn_dim": 128}, r"arch\.ffn_dim=128: expected at most the backbone's 96"),
        ({"ffn_dim": (96, 96, 96, 128)}, r"arch\.ffn_dim=128: expected at most the backbone's 96"),
        ({"num_heads": 8}, r"arch\.num_heads=8: expected at most the backbone's 4"),
        ({"num_kv_heads": 4}, r"arch\.num_kv_heads=4: expected a divisor of the backbone's 2"),
        ({"tie_embeddings": False}, r"arch\.tie_embeddings=false"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(backbone, change, message):
    folder, _, importance, _ = backbone
    with pytest.raises(InputError, match=message):
        prune(folder, importance, SPEC.replace(**change))


def test_a_cut_off_checkpoint_is_named(backbone):
    folder, _, importance, _ = backbone
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        prune(folder, importance, SPEC)
