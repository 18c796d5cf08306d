"""Lines that libraries print and nobody can act on, and the one place that drops them."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

NOISE = re.compile(
    r"Failed to load .*torchao"  # optional GPU kernels
    r"|cpuinfo_utils\.cpp"  # probes files that only phones have
    r"|No temp allocator provided"  # custom_sdpa called outside of a program
    r"|is an Enum subclass and is now natively supported by torch\.compile"
    r"|Detected no triton"
)
"""A line that matches is dropped; everything else passes."""

# Filters act on the very logger that a record is made with, not on its children.
_NOISY_LOGGERS = ("torchao", "torchao.kernel.intmm", "torch.utils._pytree")

_lock = threading.Lock()
_users = 0
_filters = ExitStack()
"""Shared by all threads inside of `quiet`: the first brings them, the last takes them away."""


def is_noise(line: str) -> bool:
    """Whether a line of a library's output says nothing to a user."""
    return NOISE.search(line) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Drop `NOISE` lines from stderr, those of native code included, inside the block."""
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
    # A KV cache starts without content, which is what it should do.
    warnings.filterwarnings("ignore", message="Mutation on a buffer in the model is detected")
    # These are about the libraries' own use of each other.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def _filtered_loggers() -> Iterator[None]:
    """Apply the filter to log handlers too: pytest's and Hydra's do not write to descriptor 2."""

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
    with os.fdopen(readable, "rb") as lines:
        for line in lines:
            if not is_noise(line.decode(errors="replace")):
                os.write(real, line)
