"""Execution of code that a model wrote, by bubblewrap: no network, no files of yours, limits.

The process sees the system's libraries and this Python, read-only, and a temporary folder.
"""

import secrets
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from flash.errors import InputError

TIMEOUT_S = 10.0
"""Longest duration of a program [s]; HumanEval's own is 3 s on a machine that does nothing else."""
MEMORY_MIB = 2048
"""Most address space of a program [MiB]."""
FILE_MIB = 16
"""Largest file that a program may write [MiB]."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
"""Folders of libraries and programs, where they exist."""
PRELUDE = f"""
import resource, runpy, sys
for name, limit in (
    ("AS", {MEMORY_MIB << 20}), ("FSIZE", {FILE_MIB << 20}), ("CORE", 0), ("NPROC", 64)
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
runpy.run_path("program.py", run_name="__main__")
"""


def passes(program: str) -> bool:
    """Run Python code; True if it comes to its end without an error.

    A program that leaves early, as by `exit()`, does not come to its end.

    Raises:
        InputError: The sandbox does not work on this machine.
    """
    check_sandbox()
    with tempfile.TemporaryDirectory(prefix="flash-sandbox-") as folder:
        mark = f"end_{secrets.token_hex(8)}"
        end = f'\nopen("{mark}", "w").close()\n'
        Path(folder, "program.py").write_text(program + end, "utf-8", errors="surrogatepass")
        try:
            subprocess.run(
                [*_command(folder), sys.executable, "-I", "-c", PRELUDE],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        return Path(folder, mark).is_file()


@cache
def check_sandbox() -> None:
    """Check that bubblewrap is installed and works.

    Raises:
        InputError: It is missing, or the system forbids it.
    """
    reason = "bwrap: not installed"
    if shutil.which("bwrap") is not None:
        with tempfile.TemporaryDirectory(prefix="flash-sandbox-") as folder:
            command = [*_command(folder), sys.executable, "-I", "-c", ""]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        reason = done.stderr.strip().partition("\n")[0]
    raise InputError(
        f"suite.tasks: code that the model writes runs in a sandbox of bubblewrap ({reason}); "
        "expected Linux with the package bubblewrap and user namespaces; install it, or leave such "
        "tasks out by suite.leave_out"
    )


def _command(folder: str) -> list[str]:
    """Command of bubblewrap in front of a program that runs in `folder`."""
    visible = dict.fromkeys([*SYSTEM, sys.base_prefix, sys.prefix])
    links = [option for path in visible for option in ("--ro-bind-try", path, path)]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *links,
        *("--proc", "/proc", "--dev", "/dev"),
        # Under its own path, which hides no other.
        *("--bind", folder, folder, "--chdir", folder, "--setenv", "TMPDIR", folder),
        *("--setenv", "HOME", folder, "--setenv", "OMP_NUM_THREADS", "1", "--"),
    ]
