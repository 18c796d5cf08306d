"""Progress with time left, for terminals and for logs."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over `items` while stderr shows how far it is and how long it still takes."""
    bar = progress_bar(what, total if total is not None else _length(items))
    with bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(
    what: str, total: int | None, unit: str = "it", *, shown: bool = True
) -> "tqdm[Any]":
    """A bar to be updated by hand. Where no terminal is attached it prints a line now and then."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        dynamic_ncols=is_terminal,
        mininterval=0.2 if is_terminal else 5.0,
        ascii=not is_terminal,
        delay=2.0,  # what is over sooner needs no bar
        leave=True,
        disable=not shown,
    )


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
