"""The errors that users are meant to see, and helpers that word them."""

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import cast


class InputError(ValueError):
    """Input that cannot be used: commands print it in one line and exit with code 2."""


def shown(value: object) -> str:
    """A value as YAML on a command line has it, such as `true`, `null` and `[1, 2]`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return value.name
        case list() | tuple():
            return f"[{', '.join(map(shown, value))}]"
        case dict():
            return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
        case str():
            return value or "''"
        case _:
            return str(value)


_SECRETS = re.compile(
    r"(?<=://)[^/@\s]*:\S+(?=@)"
    r"|(?i:(?<=password=)|(?<=_token=)|(?<=_key=)|(?<=secret=)|(?<=passwd=))"
    r"(?:'[^']*'|\"[^\"]*\"|[^&\s'\"]+)"
)
"""Passwords in URLs, and values of keys that are named as secrets."""


def without_secrets(text: str) -> str:
    """Return a command line or an address with `***` in place of passwords and keys."""
    return _SECRETS.sub("***", text)


def is_number(value: object) -> bool:
    """Return True for a finite integer or float, which true and false are not."""
    return type(value) in {int, float} and abs(cast(float, value)) <= sys.float_info.max


def printable(text: str) -> str:
    """Return text as one line: control characters, also those of terminals, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str, longest: int = 200) -> str:
    """Return text, its end as `...` if it is longer than `longest`."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Check one value.

    Raises:
        InputError: `condition` is false; the message is `<key>=<value>: expected <expected>`.
    """
    if not condition:
        raise InputError(f"{key}={shown(value)}: expected {expected}")


def check_seed(seed: int) -> None:
    """Check a command's `seed`, which NumPy and Lightning take from 0 to 2**32 - 1.

    Raises:
        InputError: It is none of those.
    """
    require(0 <= seed < 2**32, "seed", seed, "an integer from 0 to 4294967295")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_name(key: str, name: str | None) -> None:
    """Check a name, which becomes that of files and folders and a word on command lines.

    Args:
        key: Key of the setting.
        name: The name; None is one that is not set.

    Raises:
        InputError: It has other characters than letters, digits, `_`, `-` and `.`, begins with one
            of the last two, or is too long.
    """
    require(
        name is None or _NAME.fullmatch(name) is not None,
        key,
        name,
        "at most 128 letters, digits, '_', '-' and '.', beginning with one of the first three",
    )


@contextmanager
def under(path: str, separator: str = ".") -> Iterator[None]:
    """Complete the key that an error inside of the block names.

    A class of settings knows its own keys but not the place where a user typed them, so its errors
    name keys relative to it. The caller knows the place: an error `ffn_dim=33: ...` inside of
    `with under("backbone.arch")` becomes `backbone.arch.ffn_dim=33: ...`. Blocks can be nested.

    Args:
        path: Key of the settings, or the name of a file that holds them.
        separator: Text between `path` and the relative key.

    Raises:
        InputError: The error of the block itself, its class and its cause as they were.
    """
    try:
        yield
    except InputError as error:
        error.args = (f"{path}{separator}{error}",)
        raise


def closest(name: str, valid: Iterable[str]) -> str | None:
    """A hint that names the closest valid name; None when none is close."""
    close = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the closest valid name, or lists all of them when none is close."""
    names = sorted(valid)
    listed = f"valid: {', '.join(names)}" if names else "no keys are valid here"
    return closest(name, names) or listed


class CheckFailed(RuntimeError):
    """A result that did not pass its check: commands print it and exit with code 1."""


class ServiceError(RuntimeError):
    """A database that failed during the work: commands print it and exit with code 1."""


def os_error_number(error: BaseException) -> int | None:
    """Return the number of an error of the system; None if it is none.

    Libraries in Rust, such as safetensors, put it into the text of errors of their own.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found is not None else None


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of writing: no space, more than the quota, more than the limit for one file."""


def is_stop(error: BaseException) -> bool:
    """True if the work was stopped from outside, so that the same work can succeed later.

    A signal, a full disk and a lack of memory stop it, and input that has to be mended.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | InputError | MemoryError):
        return True
    return os_error_number(error) in _FULL


class DeviceError(RuntimeError):
    """A process on the device died or took too long, or the device is gone."""
