"""Signals that ask a command to stop: Ctrl-C (SIGINT), SIGTERM and SIGHUP, all treated alike.

Python would end at once on SIGTERM and SIGHUP, without any `finally`: temporary files would stay,
and a trial of a search would look as if its process had crashed. A signal that is ignored, as
SIGHUP is under nohup, stays ignored.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask every command to stop."""
_ONE_STOP_S = 5.0
"""Time in which further signals belong to the same stop [s]. Some senders use several signals, and
the reaction to the first must not be disturbed; but a library may have swallowed it."""

_received: list[int] = []
_raised_at: float | None = None


def begin() -> None:
    """Let signals end the process at once and quietly, until `as_ctrl_c` takes over.

    An exception within an import could be swallowed, or print a traceback.
    """
    for number in STOPS:
        if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"\nstopped\n")
    os._exit(128 + number)


@contextmanager
def as_ctrl_c(*further: int) -> Iterator[None]:
    """Raise KeyboardInterrupt for `STOPS` and `further` signals within the block.

    Blocks can be nested. At the end the signals have the handlers that they had before.
    """
    global _raised_at
    found = {number: signal.getsignal(number) for number in (*STOPS, *further)}
    kept = {n: each for n, each in found.items() if each not in {None, signal.SIG_IGN, _raise}}
    if kept:
        _received.clear()
        _raised_at = None
    for number in kept:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    global _raised_at
    now = time.monotonic()
    _received.append(number)
    again = _raised_at is not None and now - _raised_at < _ONE_STOP_S
    if again and number != signal.SIGINT:  # a second Ctrl-C is of a user who will not wait
        return
    _raised_at = now
    raise KeyboardInterrupt


def received() -> list[int]:
    """Return the numbers of the signals so far; none if the block was interrupted without one."""
    return list(_received)


def exit_code() -> int:
    """Return the exit code of a command that was stopped: 128 and the number of the signal."""
    return 128 + (_received or [signal.SIGINT])[0]
