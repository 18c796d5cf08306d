"""Progress for terminals and for logs: bars with the time left, and stages of long work."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


_listener: ContextVar[Callable[[str], None] | None] = ContextVar("stages", default=None)


def stage(name: str) -> None:
    """Report that a stage of long work begins, to the block that listens; see `listening`."""
    listener = _listener.get()
    if listener is not None:
        listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with the name of each stage that begins in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def stages(label: str) -> Iterator[None]:
    """Show each stage of the block in a line with its time, which counts on a terminal.

    Args:
        label: Text in front of the stages.
    """
    shown, ended = _Stages(label), threading.Event()

    def count() -> None:
        while not ended.wait(1.0):
            shown.count()

    if sys.stderr.isatty():
        threading.Thread(target=count, daemon=True).start()
    try:
        with listening(shown.begin):
            yield
    finally:
        ended.set()
        shown.end()


class _Stages:
    """The stage that runs, and its line."""

    def __init__(self, label: str) -> None:
        self._label, self._name, self._began = label, "", 0.0
        self._lock = threading.Lock()
        self._start = "\r" if sys.stderr.isatty() else ""

    def begin(self, name: str) -> None:
        self.end()
        with self._lock:
            self._name, self._began = name, time.perf_counter()

    def count(self) -> None:
        with self._lock:
            if self._name:
                print(f"\r{self._line()}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        with self._lock:
            if self._name:
                print(f"{self._start}{self._line()}", file=sys.stderr, flush=True)
            self._name = ""

    def _line(self) -> str:
        return f"{self._label}: {self._name}, {time.perf_counter() - self._began:.0f} s"


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
