import pytest

from flash.arch import distance, parse_pattern
from tests.search.toy_search import BACKBONE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({"model_dim": 128}, 0.2),
        ({"model_dim": 64}, 0.2),
        ({"ffn_dim": 384}, 0.2),
        ({"ffn_dim": (768,) * 4 + (384,) * 4}, 0.1),
        ({"num_heads": 2, "num_kv_heads": 1, "vocab_size": 256}, 0.2),
        ({"num_kv_heads": 1}, 0.2 / 3),
        ({"layer_types": parse_pattern("F-F-F-F-")}, 0.1),
        ({"layer_types": parse_pattern("F-F-")}, 0.3),
        ({"sliding_window": 32}, 0),
    ],
)
def test_each_part_of_an_architecture_counts_a_fifth(changes, expected):
    other = BACKBONE.replace(**changes)
    assert distance(BACKBONE, other) == pytest.approx(expected)
    assert distance(other, BACKBONE) == pytest.approx(expected)
