"""Errors: the place that `under` puts in front of their keys, and values in YAML."""

import re

import pytest

from flash.errors import InputError, require, shown, under


class SpecialError(InputError):
    """A more special error than the one that `under` names."""


def test_nested_places_complete_the_key():
    with (
        pytest.raises(InputError, match=r"^config\.json: arch\.ffn_dim=33: expected a multiple"),
        under("config.json", ": "),
        under("arch"),
    ):
        raise InputError("ffn_dim=33: expected a multiple of 32")


def test_class_and_cause_of_the_error_stay():
    cause = KeyError("factor")
    with (
        pytest.raises(SpecialError, match=r"^arch\.rope_scaling: missing$") as caught,
        under("arch"),
    ):
        raise SpecialError("rope_scaling: missing") from cause
    assert caught.value.__cause__ is cause


def test_other_errors_pass():
    with pytest.raises(ValueError, match="^not a number$"), under("arch"):
        raise ValueError("not a number")


def test_values_are_shown_as_typed_on_a_command_line():
    """An error with Python's True or None would name a value that the command line refuses."""
    for value, text in [
        (True, "true"),
        (None, "null"),
        ([1, False], "[1, false]"),
        ({"kind": None, "size": 2.5}, "{kind: null, size: 2.5}"),
        ("", "''"),
        ("a b", "a b"),
    ]:
        assert shown(value) == text
        with pytest.raises(InputError, match=re.escape(f"key={text}: expected nothing")):
            require(False, "key", value, "nothing")
