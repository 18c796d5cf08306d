"""Reports of unexpected errors: a line for the user, and a file with what a developer needs.

An error that no part of the product has foreseen is a fault of the product, so its line asks for a
report. `install` comes first in every command; nothing slow is imported before there is an error.
"""

import os
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

_LINE = "__flash_crash__"
"""Attribute of an error whose report has been written: its line."""


def install() -> None:
    """Answer every error that nothing else catches, in any thread, with a line and a file."""
    sys.excepthook = _answer
    threading.excepthook = lambda found: _answer(*found[:3])


def line(error: BaseException) -> str:
    """Write the report of an error, once, and return the line that names it."""
    known = getattr(error, _LINE, None)
    if known is None:
        known = f"{_summary(error)}; a fault of flash: {_written(error)}"
        error.__dict__[_LINE] = known
    return known


def _answer(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    if issubclass(kind, SystemExit):
        return  # of a thread; Python itself handles that of a process
    if error is None or not issubclass(kind, Exception):
        sys.__excepthook__(kind, error or kind(), trace)
        return
    print(f"error: {line(error)}", file=sys.stderr, flush=True)


def _summary(error: BaseException) -> str:
    from flash.errors import printable, short, without_secrets

    text = printable(without_secrets(" ".join(str(error).split())))
    return f"unexpected {type(error).__name__}" + (f" ({short(text)})" if text else "")


def _written(error: BaseException) -> str:
    from flash.errors import without_secrets
    from flash.provenance import provenance

    now = datetime.now(UTC)
    facts = "".join(f"{key}: {value}\n" for key, value in provenance().items())
    trace = without_secrets("".join(traceback.format_exception(error)))
    folder = Path(os.environ.get("FLASH_RUNS", "runs"), "crash")
    path = folder / f"{now:%Y%m%dT%H%M%S%f}-{os.getpid()}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{facts}\n{trace}", "utf-8", errors="replace")
    except OSError as failure:
        return f"its report could not be written to {path} ({failure.strerror})"
    return f"please report it with {path}"
