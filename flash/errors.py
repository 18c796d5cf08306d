"""The one error that users are meant to see."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used: the entry scripts print it in one line and exit with code 2."""


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Check one value.

    Raises:
        InputError: `condition` is false; the message is `<key>=<value>: expected <expected>`.
    """
    if not condition:
        raise InputError(f"{key}={value}: expected {expected}")


def check_seed(seed: int) -> None:
    """Check a command's `seed`, which NumPy and Lightning take from 0 to 2**32 - 1.

    Raises:
        InputError: It is none of those.
    """
    require(0 <= seed < 2**32, "seed", seed, "an integer from 0 to 4294967295")


@contextmanager
def under(path: str) -> Iterator[None]:
    """Prefix the key that an InputError raised inside names with the path of its owner.

    Settings and specs name keys relative to themselves, since one class stands in several places.

    Raises:
        InputError: As raised inside, with `path.` in front of its message.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}.{error}") from error


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the closest valid name, or lists all of them when none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(names)}" if names else "no keys are valid here"


class CheckFailed(RuntimeError):
    """A result that did not pass its check: the entry scripts print it and exit with code 1."""


class DeviceError(RuntimeError):
    """A process on the device died, took too long, or the device is gone; names what it ran."""
