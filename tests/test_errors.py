"""Errors: the place that `under` puts in front of their keys, and values in YAML."""

import re

import pytest

from flash.errors import InputError, is_stop, require, shown, under, without_secrets


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


@pytest.mark.parametrize(
    "text",
    [
        "flash search search.storage=postgresql://me:secret@host/db runs=x",
        "postgresql://me:a@b/secret@host/db",
        "'search.storage=postgresql://me@host/db?password=secret&sslpassword=secret' runs=x",
        "password='the secret' runs=x",
        'postgresql://host/db?PASSWORD="the secret"',
        "hf_token=secret runs=x",
    ],
)
def test_passwords_are_not_shown_and_the_rest_is(text):
    shown_text = without_secrets(text)
    assert "secret" not in shown_text
    assert "***" in shown_text
    assert shown_text[:8] == text[:8]
    assert shown_text.endswith("runs=x") == text.endswith("runs=x")


def test_an_address_without_a_password_is_shown_as_it_is():
    for text in ("http://127.0.0.1:8080/a", "postgresql://me@host:5432/db?sslmode=require"):
        assert without_secrets(text) == text


def test_what_comes_from_outside_stops_work_and_other_errors_end_it():
    assert all(map(is_stop, [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space")]))
    assert is_stop(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert all(map(is_stop, [MemoryError(), InputError("last.ckpt: damaged; delete it")]))
    assert not any(map(is_stop, [ValueError(), OSError(5, "I/O"), OSError("other")]))
