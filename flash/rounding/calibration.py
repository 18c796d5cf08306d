"""Memory for the calibration of `gptq`."""

import os
from pathlib import Path

from flash.arch import ArchSpec
from flash.errors import require

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
"""Folder in which a container finds its limits."""


def check_calibration(key: str, tokens: int, spec: ArchSpec) -> None:
    """Check that memory has room for the inputs of a layer for all of the calibration text.

    Everything else of the calibration needs as much memory for any number of tokens.

    Args:
        key: Setting that has the number of tokens.
        tokens: Tokens of calibration text.
        spec: Architecture to round.

    Raises:
        InputError: The inputs are larger than the memory of this machine.
    """
    each, memory = 4 * spec.model_dim, machine_memory()
    require(
        tokens * each <= memory,
        key,
        tokens,
        f"at most {memory // each}: the inputs of a layer would take {tokens * each / GIB:.1f} "
        f"GiB, of {memory / GIB:.1f} GiB of memory on this machine",
    )


def machine_memory() -> int:
    """Memory of this machine, or that a container may take of it [bytes]."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups v2 and v1
        try:
            limit = (CGROUP / name).read_text("utf-8").strip()
        except OSError:
            continue
        if limit.isdigit():  # "max" is no limit
            memory = min(memory, int(limit))
    return memory
