import pytest

from flash.arch import ArchSpec, Attention, parse_pattern
from flash.errors import InputError

SPEC = ArchSpec(
    model_dim=256,
    ffn_dim=576,
    layer_types=parse_pattern("FF-SF"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
)


def test_round_trips():
    assert ArchSpec.from_dict(SPEC.to_dict()) == SPEC
    assert ArchSpec.from_json(SPEC.to_json()) == SPEC
    assert hash(ArchSpec.from_json(SPEC.to_json())) == hash(SPEC)
    assert parse_pattern(SPEC.pattern) == SPEC.layer_types


def test_widths_by_layer_round_trip_and_equal_ones_are_one_number():
    spec = SPEC.replace(ffn_dim=(576, 576, 32, 64, 576))
    assert ArchSpec.from_json(spec.to_json()) == spec
    assert spec.to_dict()["ffn_dim"] == [576, 576, 32, 64, 576]
    assert "f32-576" in str(spec)
    assert SPEC.replace(ffn_dim=[576] * 5) == SPEC
    assert SPEC.ffn_dims == (576,) * 5


def test_the_longest_run_counts_skips_and_windows_alike():
    assert SPEC.longest_efficient_run == 2
    assert SPEC.replace(layer_types=parse_pattern("FFF")).longest_efficient_run == 0
    assert SPEC.attention_layers == (0, 1, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"^num_kv_heads=3: expected a divisor of num_heads=4"),
        ({"model_dim": 100}, r"^model_dim=100: expected a multiple of 32"),
        ({"ffn_dim": [576, 32]}, r"^ffn_dim=\[576, 32\]: expected one width, or one for each of 5"),
        ({"ffn_dim": [576, 32, 32, 32, 33]}, r"^ffn_dim=33: expected a multiple of 32"),
        ({"ffn_dim": [576, 32, 32, 32, "x"]}, r"^ffn_dim=x: expected a positive integer"),
        ({"ffn_dim": 2**40}, r"^ffn_dim=1099511627776: expected at most 2147483647"),
        ({"rope_theta": float("inf")}, r"^rope_theta=inf: expected a positive number"),
        ({"rope_theta": "abc"}, r"^rope_theta=abc: expected a positive number"),
        ({"norm_eps": None}, r"^norm_eps=null: expected a positive number"),
        ({"norm_eps": True}, r"^norm_eps=true: expected a positive number"),
        ({"tie_embeddings": "maybe"}, r"^tie_embeddings=maybe: expected true or false"),
        ({"rope_scaling": 5}, r"^rope_scaling=5: expected a mapping with kind and factor"),
        (
            {"rope_scaling": {"kind": ["linear"], "factor": 2}},
            r"^rope_scaling\.kind=\[linear\]: expected one of linear, llama3",
        ),
        (
            {"rope_scaling": {"kind": "linear", "factor": "x"}},
            r"^rope_scaling\.factor=x: expected a number of at least 1",
        ),
        ({"layer_types": "F" * 10_001}, r"^layer_types=\.\.\.: expected at most 10000 layers"),
        ({"layer_types": [None]}, r"^layer_types=null: expected one of full_attention"),
        ({"ffn_dim": 0}, r"^ffn_dim=0: expected a positive integer"),
        ({"head_dim": 33}, r"^head_dim=33: expected an even number"),
        ({"head_dim": 2}, r"^head_dim=2: expected a size whose product with num_heads=4"),
        ({"layer_types": ()}, r"^layer_types=\[\]: expected at least one layer"),
        (
            {"layer_types": ("full_atention",)},
            "^layer_types=full_atention: .*did you mean 'full_attention'",
        ),
        ({"layer_types": "FX"}, "^layer_types=FX: expected only the letters F, S and -"),
        (
            {"rope_scaling": {"kind": "linear", "factor": 0.5}},
            r"^rope_scaling\.factor=0\.5: expected",
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"^rope_scaling\.kind: missing"),
        ({"norm_eps": 0.0}, r"^norm_eps=0\.0: expected a positive number"),
    ],
)
def test_illegal_specs_raise(change, message):
    with pytest.raises(InputError, match=message):
        SPEC.replace(**change)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(InputError, match=r"^ffn_dims: unknown key; did you mean 'ffn_dim'"):
        ArchSpec.from_dict({**SPEC.to_dict(), "ffn_dims": 1})
    with pytest.raises(InputError, match=r"^ffn_dim: missing"):
        ArchSpec.from_dict({k: v for k, v in SPEC.to_dict().items() if k != "ffn_dim"})


def test_kinds_have_the_ecosystems_names():
    assert [kind.value for kind in Attention] == [
        "full_attention",
        "sliding_attention",
        "skip_attention",
    ]
