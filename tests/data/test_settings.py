"""Illegal values are refused, by the name of their key, and every field says what it means."""

import ast
import dataclasses
import inspect
import math
import re

import pytest

from flash.data import settings as module
from flash.data.settings import (
    DataKind,
    DataSettings,
    FileFormat,
    PrepareSettings,
    TextSourceSettings,
)
from flash.errors import InputError

SOURCE = TextSourceSettings(path="x")
ILLEGAL = [
    *((TextSourceSettings, "weight", value) for value in (0.0, -1.0, math.nan, math.inf)),
    *((DataSettings, "validation_percent", value) for value in (-1, 0, 100)),
    *((DataSettings, "seq_len", value) for value in (-1, 0, 1)),
    *((DataSettings, "bpe_vocab_size", value) for value in (-1, 0, 299)),
    (DataSettings, "validation_sequences", -1),
    *((DataSettings, "logical_shards", value) for value in (-1, 0)),
    (DataSettings, "workers", -1),
    (DataSettings, "sources", [SOURCE]),  # without an effect on kind=stdlib
    *((PrepareSettings, "tokens", value) for value in (-1, 0)),
    *((PrepareSettings, "shard_tokens", value) for value in (-1, 0)),
    (PrepareSettings, "seed", -1),
]
REQUIRED = {TextSourceSettings: {"path": "x"}, DataSettings: {"name": "x"}, PrepareSettings: {}}


@pytest.mark.parametrize(("schema", "key", "value"), ILLEGAL)
def test_illegal_values_are_named_by_their_key(schema, key, value):
    with pytest.raises(InputError, match=rf"^{key}\b.*(expected|no effect)"):
        schema(**REQUIRED[schema], **{key: value})


def test_every_number_and_list_is_checked():
    checked = {(schema, key) for schema, key, _ in ILLEGAL}
    for schema in REQUIRED:
        for field in dataclasses.fields(schema):
            if re.match(r"int|float|list", str(getattr(field.type, "__name__", field.type))):
                assert (schema, field.name) in checked


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": DataKind.folder}, r"^path=null: expected a folder for kind=folder"),
        ({"kind": DataKind.shards}, r"^path=null: expected a folder for kind=shards"),
        ({"path": "x"}, r"^path=x: expected null, it has no effect with kind=stdlib"),
        ({"kind": DataKind.datasets}, r"^sources=\[\]: expected one or more"),
        ({"validation": SOURCE}, r"^validation: has no effect with kind=stdlib"),
        ({"chat_template": "x"}, r"^chat_template=x: expected null, it has no effect with kind"),
        ({"workers": 3}, r"^logical_shards=64: expected a positive multiple of workers=3"),
        (
            {"kind": DataKind.datasets, "sources": [SOURCE], "validation_sequences": 0},
            r"^validation_sequences=0: expected 1 or more",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(values, message):
    with pytest.raises(InputError, match=message):
        DataSettings(name="x", **values)


def other_value(value):
    """Another value of a field's type, which need not be legal beside the other fields."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 4
        case None | str():
            return "other"
        case list():
            return [SOURCE]
        case _:
            return next(member for member in type(value) if member is not value)


UNCOUNTED_FIELDS = {
    DataSettings: {
        *("name", "path", "pattern", "tokenizer", "bpe_vocab_size", "chat_template"),
        *("workers", "skip_damaged"),
    },
    TextSourceSettings: {"path", "name", "revision", "split"},
}


@pytest.mark.parametrize("schema", UNCOUNTED_FIELDS)
def test_every_field_but_those_named_is_part_of_the_identity(schema):
    first = schema(**REQUIRED[schema])
    for field in dataclasses.fields(schema):
        changed = schema(**REQUIRED[schema])
        value = {"validation": SOURCE, "format": FileFormat.txt}.get(field.name)
        setattr(changed, field.name, value or other_value(getattr(first, field.name)))
        same = changed.decisive() == first.decisive()
        assert same == (field.name in UNCOUNTED_FIELDS[schema]), field.name


def test_every_field_is_documented():
    tree = ast.parse(inspect.getsource(module))
    for schema in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(schema.body, [*schema.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign | ast.Assign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{schema.name}: {ast.unparse(field)}"
