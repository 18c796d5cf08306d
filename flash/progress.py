"""Progress for terminals and for logs: bars with the time left, and stages of long work."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
def stages(label: str, shares: Mapping[str, float] | None = None) -> Iterator[None]:
    """Show each stage of the block in a line with its time, which counts on a terminal.

    Args:
        label: Text in front of the stages.
        shares: Usual share of the whole time by stage, from which the time left is estimated once
            one of these has ended; other stages are not counted. A terminal shows it.
    """
    shown, ended = _Stages(label, shares or {}), threading.Event()

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

    def __init__(self, label: str, shares: Mapping[str, float]) -> None:
        self._label, self._name, self._began = label, "", 0.0
        self._shares = shares
        self._ended_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._clear = "\r\x1b[K" if sys.stderr.isatty() else ""

    def begin(self, name: str) -> None:
        self.end()
        with self._lock:
            self._name, self._began = name, time.perf_counter()

    def count(self) -> None:
        with self._lock:
            if self._name:
                self._print(self._line() + self._left(), "")

    def end(self) -> None:
        with self._lock:
            if self._name:
                self._print(self._line(), "\n")
                if self._name in self._shares:
                    self._ended_s[self._name] = time.perf_counter() - self._began
            self._name = ""

    def _print(self, line: str, end: str) -> None:
        if self._clear:  # a line that the terminal breaks could not be cleared
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"{self._clear}{line}", end=end, file=sys.stderr, flush=True)

    def _line(self) -> str:
        return f"{self._label}: {self._name}, {time.perf_counter() - self._began:.0f} s"

    def _left(self) -> str:
        """Estimate the time left of all stages; empty if it is not known, or is over."""
        if not self._ended_s or self._name not in self._shares:
            return ""
        ended_s = sum(self._ended_s.values())
        whole_s = ended_s / sum(self._shares[name] for name in self._ended_s)
        left_s = whole_s - ended_s - (time.perf_counter() - self._began)
        return f", about {left_s:.0f} s left" if left_s > 0 else ""


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
