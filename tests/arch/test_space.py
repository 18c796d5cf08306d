import dataclasses
from itertools import product

import numpy as np
import pytest

from flash.arch import (
    ArchSpec,
    Attention,
    Choices,
    FfnChoices,
    SearchSpace,
    SpaceSettings,
    Variant,
    parse_pattern,
)
from flash.errors import InputError

BACKBONE = ArchSpec(
    model_dim=2048,
    ffn_dim=8192,
    layer_types=parse_pattern("F" * 16),
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=202048,
    tie_embeddings=False,
)
TABLE_3 = SpaceSettings(
    name="flash",
    num_layers=Choices(min=10, max=16),
    model_dim=Choices(min=1024, max=2048, step=128),
    ffn_dim=FfnChoices(min=2048, max=8192, step=256),
)
SMALL = SpaceSettings(
    name="small",
    num_layers=Choices(min=2, max=5),
    model_dim=Choices(min=64, max=128, step=64),
    ffn_dim=FfnChoices(min=128, max=192, step=64),
)


def brute_force(space: SearchSpace, depth: int) -> set[tuple[Attention, ...]]:
    patterns = product(space.kinds, repeat=depth)
    return {p for p in patterns if space.make(128, 128, p) in space}


def test_the_papers_count_comes_out():
    space = SearchSpace(TABLE_3, BACKBONE)
    assert space.count_slots() == 3**16 * 7 * 25 * 9
    assert round(space.count_slots() / 1e9, 1) == 67.8
    assert space.count(constrained=False) == sum(3**d for d in range(10, 17)) * 25 * 9


@pytest.mark.parametrize("run", [0, 1, 2, 4])
def test_counts_equal_enumeration(run):
    settings = SpaceSettings(**{**vars(SMALL), "max_efficient_run": run})
    space = SearchSpace(settings, BACKBONE)
    for depth in space.depths:
        assert space.count_patterns(depth) == len(brute_force(space, depth))
    assert space.count() == sum(map(space.count_patterns, space.depths)) * 4


def test_samples_are_uniform_over_the_members():
    space = SearchSpace(SMALL, BACKBONE)
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(6000)]
    assert all(spec in space for spec in drawn)
    members = space.count()
    index = {spec: i for i, spec in enumerate(set(drawn))}
    counts = np.bincount([index[spec] for spec in drawn])
    assert len(counts) == members
    chi2 = ((counts - 6000 / members) ** 2 / (6000 / members)).sum()
    assert chi2 < members + 4 * np.sqrt(2 * members)  # 4 standard deviations


def test_neighbors_are_members_one_step_away_and_mutual():
    space = SearchSpace(SMALL, BACKBONE)
    spec = space.make(64, 128, parse_pattern("F-F"))
    neighbors = list(space.neighbors(spec))
    assert len(neighbors) == len(set(neighbors))
    assert spec not in neighbors
    assert all(n in space for n in neighbors)
    assert all(spec in space.neighbors(n) for n in neighbors)
    assert space.make(128, 128, spec.layer_types) in neighbors
    assert space.make(64, 128, parse_pattern("FF")) in neighbors


def test_stratified_draws_visit_every_size():
    space = SearchSpace(TABLE_3, BACKBONE)
    specs = space.stratified(np.random.default_rng(0), 25)
    assert {s.num_layers for s in specs} == set(space.depths)
    assert {s.model_dim for s in specs} == set(space.model_dims)
    assert {s.ffn_dim for s in specs} == set(space.ffn_dims)
    assert all(s in space for s in specs)


def test_non_members_are_told_why():
    space = SearchSpace(SMALL, BACKBONE)
    good = space.make(64, 128, parse_pattern("FF-"))
    assert space.violated_rule(good) is None
    reasons = {
        "num_layers=6": good.replace(layer_types=parse_pattern("F" * 6)),
        "ffn_dim=256": good.replace(ffn_dim=256),
        "3 efficient layers in a row": good.replace(layer_types=parse_pattern("F-S-")),
        "no attention": good.replace(layer_types=parse_pattern("--")),
        "head_dim: expected the backbone's": good.replace(head_dim=32),
        "heads 16/8 are not among 32/8": good.replace(num_heads=16),
    }
    for reason, spec in reasons.items():
        assert reason in (space.violated_rule(spec) or "")


WIDE = dataclasses.replace(
    SMALL,
    num_layers=Choices(min=2, max=3),
    ffn_dim=FfnChoices(min=128, max=192, step=64, per_layer=True),
    num_heads=[16, 32],
    num_kv_heads=[4, 8],
    vocab_size=[1024, 202048],
)


def test_widths_by_layer_and_heads_are_counted_as_enumerated():
    space = SearchSpace(WIDE, BACKBONE)
    members = {
        space.make(model_dim, widths, pattern, Variant(*sizes))
        for depth in space.depths
        for pattern in product(space.kinds, repeat=depth)
        for widths in product(space.ffn_dims, repeat=depth)
        for model_dim in space.model_dims
        for sizes in product([16, 32], [4, 8], [1024, 202048])
    }
    assert space.count() == sum(spec in space for spec in members)
    rng = np.random.default_rng(0)
    drawn = {space.sample(rng) for _ in range(500)} | set(space.stratified(rng, 500))
    assert drawn <= members
    assert all(spec in space for spec in drawn)
    assert {Variant.of(spec) for spec in drawn} == set(space.variants)


def test_a_step_changes_the_width_of_one_layer_a_run_or_the_heads():
    space = SearchSpace(WIDE, BACKBONE)
    spec = space.make(64, (128, 192, 128), parse_pattern("FFF"), Variant(32, 8, 1024))
    neighbors = list(space.neighbors(spec))
    assert all(n in space for n in neighbors)
    changed = {n.ffn_dims for n in neighbors if n.layer_types == spec.layer_types}
    assert {(192, 192, 128), (128, 128, 128), (128, 192, 192), (192, 192, 192)} <= changed
    variants = {Variant.of(n) for n in neighbors}
    assert variants == {(32, 8, 1024), (16, 8, 1024), (32, 4, 1024), (32, 8, 202048)}
    assert {n.ffn_dims for n in neighbors if n.num_layers == 2} == {
        (128, 192),
        (192, 128),
        (128,) * 2,
    }


def test_widths_by_layer_are_not_members_of_a_space_with_one():
    space = SearchSpace(SMALL, BACKBONE)
    spec = space.make(64, (128, 192), parse_pattern("FF"))
    assert space.violated_rule(spec) == "ffn_dim=128-192 differs from layer to layer"


def test_drawn_widths_follow_a_shape_over_depth():
    """Independent draws would have the same mean in every model and no trend over depth."""
    settings = dataclasses.replace(
        TABLE_3, ffn_dim=FfnChoices(min=2048, max=8192, step=256, per_layer=True)
    )
    space = SearchSpace(settings, BACKBONE)
    specs = space.stratified(np.random.default_rng(0), 500)
    means = [spec.mean_ffn_dim for spec in specs]
    assert np.std(means) > 1500  # about 450 with independent draws
    assert any(isinstance(spec.ffn_dim, int) for spec in specs)
    trends = [np.polyfit(range(s.num_layers), s.ffn_dims, 1)[0] for s in specs]
    assert min(trends) < -150
    assert max(trends) > 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": [10**6]}, r"^space\.vocab_size=1000000: expected at most the backbone's"),
        ({"num_heads": [64]}, r"^space\.num_heads=64: expected at most the backbone's 32"),
        ({"num_kv_heads": [3]}, r"^space\.num_kv_heads=3: expected a divisor of the backbone's 8"),
        ({"num_heads": [12], "num_kv_heads": [8]}, r"^space\.num_heads=\[12\]: .* \[8\]"),
    ],
)
def test_heads_that_pruning_cannot_make_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SearchSpace(dataclasses.replace(SMALL, **change), BACKBONE)


@pytest.mark.parametrize("most", [4096, 2**60])
def test_a_space_larger_than_the_backbone_is_refused_before_its_sizes_are_listed(most):
    wide = SpaceSettings(**{**vars(SMALL), "model_dim": Choices(min=2048, max=most, step=2048)})
    with pytest.raises(InputError, match=rf"space\.model_dim\.max={most}.*backbone's 2048"):
        SearchSpace(wide, BACKBONE)


@pytest.mark.parametrize("key", ["model_dim", "ffn_dim"])
def test_widths_that_are_not_whole_groups_are_refused(key):
    odd = SpaceSettings(**{**vars(SMALL), key: FfnChoices(min=64, max=128, step=16)})
    with pytest.raises(InputError, match=rf"^space\.{key}=80: expected a multiple of 32"):
        SearchSpace(odd, BACKBONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": [Attention.skip_attention]}, r"^kinds=\[skip_attention\]: .*full_attention"),
        ({"num_kv_heads": []}, r"^num_kv_heads=\[\]: expected null, or a list of positive"),
        ({"max_efficient_run": -1}, "^max_efficient_run=-1: expected 0 or more"),
    ],
)
def test_illegal_rules_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        SpaceSettings(**{**vars(SMALL), **change})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"min": 1, "max": 10, "step": 2}, r"^max=10: expected min \+ a whole number of steps"),
        ({"min": 0, "max": 10}, "^min=0: expected a positive integer"),
        ({"min": 1, "max": 10, "step": 0}, "^step=0: expected a positive integer"),
    ],
)
def test_illegal_choices_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        Choices(**choices)
