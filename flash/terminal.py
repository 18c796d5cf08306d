"""Behavior on a terminal: width of lines, signals, crashes, readers that end.

`begin` comes first in every command, so this module imports nothing that takes time.
"""

import atexit
import os
import sys
from collections.abc import Sequence

from flash import crash, signals

COLUMNS = 80
"""Width that tables, summaries and help texts fit into."""


def begin() -> None:
    """Make signals during the imports, and a closed pipe at the end, as quiet as later ones.

    An error that nothing catches becomes one line and a file.
    """
    crash.install()
    signals.begin()
    atexit.unregister(_flush)
    atexit.register(_flush)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop_output()


def drop_output() -> None:
    """Send all further output nowhere: its reader, such as `head`, is gone, or its disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def wrap(text: str, indent: str = "", width: int = COLUMNS) -> str:
    """Break lines of `text` between words to at most `width` columns.

    Args:
        text: Its own line breaks are kept. Words that are too long, such as paths, stay whole.
        indent: Beginning of every line after a break.
        width: Number of columns.
    """
    from textwrap import TextWrapper

    wrapper = TextWrapper(
        width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(line) for line in text.splitlines())


def finish(made: Sequence[object], following: str) -> None:
    """Print the end of a command: the files and folders that it made, and what to type next."""
    print("".join(f"\nmade: {path}" for path in made))
    print(f"next: {following}")


def table(rows: Sequence[Sequence[str]], width: int = COLUMNS) -> str:
    """Align a table; columns for which the width is too small follow in a table of their own.

    Args:
        rows: Cells, header first. The first column, which begins each of the tables, names the row.
        width: Number of columns of the terminal.
    """
    columns = list(zip(*rows, strict=True))
    aligned = [_aligned(column) for column in columns]
    parts: list[list[list[str]]] = []
    room = -1
    for column in aligned[1:]:
        room -= 2 + len(column[0])
        if room < 0:
            parts.append([aligned[0]])
            room = width - len(aligned[0][0]) - 2 - len(column[0])
        parts[-1].append(column)
    texts = [
        "\n".join("  ".join(row).rstrip() for row in zip(*part, strict=True)) for part in parts
    ]
    return "\n\n".join(texts)


def _aligned(column: Sequence[str]) -> list[str]:
    """Cells of one width: numbers end, and words begin, below each other."""
    size = max(map(len, column))
    numeric = all(cell[:1] in "0123456789+-." for cell in column[1:])
    return [cell.rjust(size) if numeric else cell.ljust(size) for cell in column]
