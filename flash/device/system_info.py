"""Description of a Linux machine: processor, cores, system and ExecuTorch version.

The host calls `probe` in its own process; a board's Python gets this file over ssh as a script. It
therefore needs only the standard library of any Python 3, and nothing of `flash`.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

EXTENSIONS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
    "sme2",
)
"""Vector extensions by which XNNPACK and BLAS choose their kernels. Clouds use one name for
processors of several generations, whose times differ severalfold; extensions tell them apart."""


def processor():
    """Name of the processor, codes of an Arm one's kinds of cores, and its vector extensions.

    Kernels for Arm tell a core by the codes of its maker and its kind; few tell a name.
    """
    name, flags, maker, cores = "", [], "", []
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                key = key.strip()
                if key in ("model name", "Model", "Hardware") and not name:
                    name = value.strip()
                elif key in ("flags", "Features") and not flags:
                    flags = value.split()
                elif key == "CPU implementer":
                    maker = value.strip()
                elif key == "CPU part" and maker + ":" + value.strip() not in cores:
                    cores.append(maker + ":" + value.strip())
    except (OSError, ValueError):  # the latter for bytes that are no text
        pass
    name = name or board() or platform.processor() or platform.machine()
    name = " ".join([name] + cores)
    known = " ".join(each for each in EXTENSIONS if each in flags)
    return f"{name} ({known})" if known else name


def board():
    """Name of a board in the device tree of its kernel, or "" if there is none."""
    try:
        with open("/proc/device-tree/model") as file:
            return file.read().strip("\0 \n")
    except (OSError, ValueError):
        return ""


def runtime():
    """Version of the installed ExecuTorch, or "" if it or torch, which it needs, is missing."""
    try:
        version("torch")
        return "executorch " + version("executorch")
    except PackageNotFoundError:
        return ""


def no_huge_pages():
    """Reason why glibc cannot have huge pages from the kernel, or "" if it can."""
    if platform.libc_ver()[0] != "glibc":
        return "its C library is not glibc"
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return "its kernel's transparent_hugepage is never" if "[never]" in file.read() else ""
    except OSError:
        return "its kernel has no transparent_hugepage"


def probe():
    """Processor, cores, system, runtime and lack of huge pages as plain values."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 1,
        "system": platform.system() + " " + platform.machine(),
        "runtime": runtime(),
        "no_huge_pages": no_huge_pages(),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
