"""Progress bars with the time left, for terminals and for logs."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over `items` with a progress bar on stderr.

    Args:
        items: Items to iterate over.
        label: Text in front of the bar.
        total: Number of items; None takes their length if they have one.
    """
    bar = progress_bar(label, total if total is not None else _length(items))
    with bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(
    label: str, total: int | None, unit: str = "it", *, shown: bool = True
) -> "tqdm[Any]":
    """A progress bar that the caller updates; without a terminal it prints a line now and then.

    Args:
        label: Text in front of the bar.
        total: Number of updates; None if it is unknown.
        unit: Name of what is counted.
        shown: False makes a bar that prints nothing.
    """
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        dynamic_ncols=is_terminal,
        mininterval=0.2 if is_terminal else 5.0,
        ascii=not is_terminal,
        delay=2.0,  # shorter work needs no bar
        leave=True,
        disable=not shown,
    )


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
