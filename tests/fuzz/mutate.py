"""Changes of JSON values and of files that make them bad or odd."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "5", "true", "null", "\x1b[31mred\n"),
    *("../../escape", "/etc/passwd", "<script>", "ü" * 300, [], {}, [None], [[]], {"a": 1}),
)
"""Values to put in the place of another."""


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside of a JSON value, and to the value itself."""
    yield path
    inner: Any = ()
    if isinstance(values, dict):
        inner = values.items()
    elif isinstance(values, list):
        inner = list(enumerate(values))[:3]  # further items are alike
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(values: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Copy of a JSON value with `change` applied at `path`; `DELETE` takes the place away."""
    if not path:
        return change(values)
    copy = values.copy()
    new = changed(copy[path[0]], path[1:], change)
    if new is DELETE:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy


DELETE = object()
"""Result of a change that takes the place away."""


def json_changes(values: Any, random: Random) -> Iterator[tuple[str, Any]]:
    """All changes of one place of a JSON value, in random order: words, and the changed value."""
    jobs = [(path, odd) for path in places(values) for odd in (*ODD_VALUES, DELETE) if path]
    random.shuffle(jobs)
    for path, odd in jobs:
        name = ".".join(map(str, path))
        word = "deleted" if odd is DELETE else repr(odd)[:40]
        yield f"{name}: {word}", changed(values, path, lambda _, odd=odd: odd)


def byte_changes(content: bytes, random: Random) -> Iterator[tuple[str, bytes | None]]:
    """Endless changes of a file's content: words, and the content; None for a folder instead."""
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(content)}\n"
    )
    fixed: list[tuple[str, bytes | None]] = [
        ("empty", b""),
        ("a folder", None),
        ("a pointer of LFS", pointer.encode()),
        ("zeros", bytes(len(content))),
        ("blanks", b"   \n"),
        ("null", b"null"),
        ("a number", b"5"),
        ("a list", b"[]"),
        ("an object", b"{}"),
        ("a page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("deep", b"[" * 100_000),
        ("a BOM", b"\xef\xbb\xbf" + content),
        ("twice", content + content),
        ("Latin-1", b"\xe4\xf6\xfc" + content),
        ("UTF-16", content.decode("latin-1").encode("utf-16")),
    ]
    random.shuffle(fixed)
    yield from fixed
    while True:
        where = random.randrange(max(1, len(content)))
        length = random.choice([1, 2, 8, 64])
        way = random.choice(["cut", "noise", "lost", "zeros", "flip"])
        match way:
            case "cut":
                new = content[:where]
            case "noise":
                new = content[:where] + random.randbytes(length) + content[where + length :]
            case "lost":
                new = content[:where] + content[where + length :]
            case "zeros":
                new = content[:where] + bytes(length) + content[where + length :]
            case _:
                flipped = content[where : where + 1]
                bit = 1 << random.randrange(8)
                new = content[:where] + bytes(b ^ bit for b in flipped) + content[where + 1 :]
        yield f"{way} of {length} at {where}", new


def write_changed(path: Path, content: bytes | None) -> None:
    """Put changed content in the place of a file."""
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


def to_json(values: Any) -> bytes:
    """JSON text of changed values."""
    return json.dumps(values).encode("utf-8", errors="surrogatepass")
