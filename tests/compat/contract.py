"""Context manager of contract tests, which explains a failure in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def contract(names: str, user: str, purpose: str) -> Iterator[None]:
    """Convert any error inside the block to a sentence about a dependency.

    Args:
        names: The private or undocumented names.
        user: Function of flash that uses them.
        purpose: Purpose of the use, a verb phrase that continues "relies on it to".

    Raises:
        Failed: An error of any kind inside the block.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        sentence = f"{names} is gone or behaves differently: {user} relies on it to {purpose}"
        raise pytest.fail.Exception(f"{sentence} ({reason})", pytrace=False) from None
