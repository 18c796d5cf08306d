"""Behavior on a terminal: width of lines, Ctrl-C before the work, and readers that end early.

`begin` comes first in every command, so this module imports nothing that takes time.
"""

import atexit
import os
import signal
import sys

COLUMNS = 80
"""Width that tables, summaries and help texts fit into."""


def begin() -> None:
    """Make Ctrl-C during the imports, and a closed pipe at the end, as quiet as later ones."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    atexit.unregister(_flush)
    atexit.register(_flush)


def _stop(number: int, frame: object) -> None:
    os.write(2, b"\nstopped\n")
    os._exit(130)  # an exception within an import could be swallowed, or print a traceback


def begin_work() -> None:
    """Turn Ctrl-C into KeyboardInterrupt again, from where it is caught."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            drop_output()


def drop_output() -> None:
    """Send all further output nowhere, because its reader, such as `head`, has ended."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
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
