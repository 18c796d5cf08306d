"""Limits of a chat template, which is a program that need not come to an end."""

import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

from flash.errors import InputError

MAX_CHARACTERS = 1 << 24
"""Most characters of a rendered conversation; a context of a million tokens is about a fourth."""
_CPU_S = 3
"""Longest time for a short conversation [s], which takes milliseconds."""
_MEMORY_MIB = 512
"""Most memory for a short conversation [MiB]."""
_CHARACTERS = 1 << 17
"""Most characters of a short conversation; descriptions of many tools are about half."""
LIMITS = f"{_CPU_S} s, {_MEMORY_MIB} MiB or {_CHARACTERS:,} characters"


def within_limits(render: Callable[[], str]) -> bool:
    """Call a function in a forked process; False if it goes beyond the limits.

    An exception is an end like any other, but for `InputError`, by which the function reports that
    its result is too long. Only a process can be stopped anywhere: in this one, a power of large
    integers could not even be interrupted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child takes no lock of a thread
        child = os.fork()
    if child == 0:
        _try(render)
    _, status = os.waitpid(child, 0)
    return status == 0


def _try(render: Callable[[], str]) -> None:
    code = 1
    try:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        memory = _address_space() + (_MEMORY_MIB << 20)
        if most == resource.RLIM_INFINITY or memory < most:
            resource.setrlimit(resource.RLIMIT_AS, (memory, most))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = int(len(render()) > _CHARACTERS)
    except (MemoryError, InputError):
        pass
    except Exception:  # a template is a program, which fails in its own ways
        code = 0
    finally:
        os._exit(code)


def _address_space() -> int:
    """Size of this process [bytes]; without Linux's files, far more than any process has."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except OSError:
        return 1 << 50
    return pages * resource.getpagesize()
