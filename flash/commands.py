"""Command lines for messages: scripts of the repository, or the installed command `flash`."""

import os
import shlex
import sys
from pathlib import Path

SCRIPTS = ("train", "search", "export")
"""Commands that have a script at the top of the repository."""
_VARIABLE = "FLASH_FROM_SCRIPTS"


def begin(verb: str) -> None:
    """Record in the environment whether this process was started by a script or by `flash`.

    Child processes inherit it, and help texts in `conf/*.yaml` contain FLASH_COMMAND.
    """
    if Path(sys.argv[0]).name == f"{verb}.py":
        os.environ[_VARIABLE] = "1"
    else:
        os.environ.pop(_VARIABLE, None)
        sys.argv[0] = f"flash {verb}"
    os.environ["FLASH_COMMAND"] = command(verb)


def command(verb: str) -> str:
    """Return `python VERB.py` if this process was started by a script, else `flash VERB`."""
    if _VARIABLE in os.environ and verb in SCRIPTS:
        return f"python {verb}.py"
    return f"flash {verb}"


def this_command() -> str:
    """Return the command line of this process, quoted for a shell."""
    program, *arguments = sys.argv
    start = f"python {shlex.quote(program)}" if program.endswith(".py") else program
    return " ".join([start, *map(shlex.quote, arguments)])
