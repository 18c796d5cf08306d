"""Commands as users type them: a clone's scripts, or the installed `flash`."""

import os
import shlex
import sys
from pathlib import Path

SCRIPTS = ("train", "search", "export")
"""Verbs that have a script at the top of a clone."""
_VARIABLE = "FLASH_FROM_SCRIPTS"


def begin(verb: str) -> None:
    """Remember how this process was started, for itself and for the processes that it starts.

    Help texts of `conf/*.yaml` name the command by the variable FLASH_COMMAND.
    """
    if Path(sys.argv[0]).name == f"{verb}.py":
        os.environ[_VARIABLE] = "1"
    else:
        os.environ.pop(_VARIABLE, None)
        sys.argv[0] = f"flash {verb}"
    os.environ["FLASH_COMMAND"] = command(verb)


def command(verb: str) -> str:
    """`python train.py` where scripts are in use and have the verb, else `flash train`."""
    if _VARIABLE in os.environ and verb in SCRIPTS:
        return f"python {verb}.py"
    return f"flash {verb}"


def this_command() -> str:
    """The command line of this process, to be typed again."""
    program, *arguments = sys.argv
    start = f"python {program}" if program.endswith(".py") else program
    return " ".join([start, *map(shlex.quote, arguments)])
