"""Failures of contract tests in one sentence: what has changed, and who relies on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def contract(names: str, user: str, purpose: str) -> Iterator[None]:
    """Turn any error inside the block into a sentence about a dependency.

    Args:
        names: The private or undocumented names.
        user: The function of ours that uses them.
        purpose: Continues "relies on it to".
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        sentence = f"{names} is gone or behaves differently: {user} relies on it to {purpose}"
        raise pytest.fail.Exception(f"{sentence} ({said})", pytrace=False) from None
