"""Facts about annotations: what may stand in the place of a setting."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from omegaconf import MISSING, OmegaConf

from flash.schemas import hint_at, is_alike


class Kind(Enum):
    a = "a"


@dataclass
class Part:
    size: int = 1


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    maybe: Part | None = None
    other: Any = None
    numbers: list[int] = field(default_factory=lambda: [1])
    words: list[str] | None = None
    weights: dict[str, float] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=lambda: {"a": "text"})
    parts: dict[str, Part] = field(default_factory=lambda: {"x": Part()})
    rows: list[Part] = field(default_factory=lambda: [Part()])
    kind: Kind = Kind.a
    missing: Part = MISSING


NODE = OmegaConf.structured(Whole)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("part", NODE.part),
        ("part", NODE.parts.x),
        ("part", NODE.rows[0]),
        ("maybe", NODE.part),
        ("maybe", None),
        ("other", NODE.part),
        ("words", None),
        ("numbers", OmegaConf.create([1, 2])),  # as a resolver returns it
        ("weights", OmegaConf.create({"a": 1, "b": 0.5})),
        ("free", NODE.weights),
        ("free", NODE.parts),
    ],
)
def test_what_an_annotation_takes(key, value):
    assert is_alike(hint_at(NODE, key), value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("part", NODE),
        ("part", NODE.weights),
        ("part", None),
        ("part", Kind.a),
        ("maybe", NODE.free),
        ("numbers", OmegaConf.create(["a"])),
        ("numbers", NODE.weights),
        ("numbers", None),
        ("words", NODE.numbers),
        ("weights", NODE.free),
        ("weights", NODE.part),
        ("weights", NODE.parts),
        ("weights", Kind.a),
        ("parts", NODE.weights),
    ],
)
def test_what_it_does_not_take(key, value):
    assert not is_alike(hint_at(NODE, key), value)


def test_entries_of_mappings_and_lists_have_the_annotation_of_their_items():
    assert hint_at(NODE.parts, "x") is Part
    assert hint_at(NODE.rows, 0) is Part
    assert hint_at(NODE.free, "a") is None
