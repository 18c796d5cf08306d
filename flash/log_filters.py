"""Form of log lines, and filters for lines of libraries that no user can act on."""

import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flash.terminal import COLUMNS, wrap

NOISE = re.compile(
    r"Failed to load .*torchao"  # optional GPU kernels
    r"|cpuinfo_utils\.cpp"  # probes files that only phones have
    r"|Resetting threadpool to"  # as the runner asks it to
    r"|No temp allocator provided"  # custom_sdpa called outside of a program
    r"|is an Enum subclass and is now natively supported by torch\.compile"
    r"|Detected no triton"
)
"""Pattern of the lines that are dropped."""

# A filter acts on the logger that makes a record, not on the children of that logger.
_NOISY_LOGGERS = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree")

_lock = threading.Lock()
_users = 0
_filters = ExitStack()
"""Filters for all threads inside of `quiet`. The first one sets them up, the last removes them."""


_TIME = " " * len("00:00:00 ")


class LogFormatter(logging.Formatter):
    """Formatter with the time of day, whose lines are wrapped on a terminal, but not in files."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not sys.stderr.isatty():
            return text
        columns = shutil.get_terminal_size((COLUMNS, 24)).columns
        return wrap(text, _TIME, max(columns, COLUMNS // 2))


def is_noise(line: str) -> bool:
    """True if a line matches `NOISE`."""
    return NOISE.search(line) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Drop lines that match `NOISE` from stderr inside the block, also those of native code.

    Blocks can be nested, and threads can be inside of them at the same time.
    """
    global _users, _filters
    with _lock:
        if _users == 0:
            with ExitStack() as stack:
                stack.enter_context(_filtered_descriptor())
                stack.enter_context(warnings.catch_warnings())
                stack.enter_context(_filtered_loggers())
                _ignore_known_warnings()
                _filters = stack.pop_all()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _filters.close()


def _ignore_known_warnings() -> None:
    # A KV cache starts empty and is filled in place, as it should be.
    warnings.filterwarnings("ignore", message="Mutation on a buffer in the model is detected")
    # These are about how the libraries use each other.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def _filtered_loggers() -> Iterator[None]:
    """Filter log records too, because the handlers of pytest and Hydra bypass file descriptor 2."""

    def keep(record: logging.LogRecord) -> bool:
        return not is_noise(record.getMessage())

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


@contextmanager
def _filtered_descriptor() -> Iterator[None]:
    """Send file descriptor 2 through a pipe, and forward all lines but those that match."""
    sys.stderr.flush()
    real = os.dup(2)
    readable, writable = os.pipe()
    os.dup2(writable, 2)
    os.close(writable)
    forwarder = threading.Thread(target=_forward, args=(readable, real), daemon=True)
    forwarder.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)  # closes the pipe's last writing end
        forwarder.join(timeout=5)
        os.close(real)


def _forward(readable: int, real: int) -> None:
    rest = b""
    while read := os.read(readable, 1 << 16):
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            if not is_noise(line.decode(errors="replace")):
                os.write(real, line + b"\n")
        if rest.startswith(b"\r"):  # a progress bar, which ends in no newline
            os.write(real, rest)
            rest = b""
    if rest and not is_noise(rest.decode(errors="replace")):
        os.write(real, rest)
    os.close(readable)
