"""Command lines for messages: scripts of the repository, or the installed command `flash`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from flash.ranks import is_main_process

SCRIPTS = ("train", "search", "export")
"""Commands that have a script at the top of the repository."""
_FROM_SCRIPTS = "FLASH_FROM_SCRIPTS"
_VERB = "FLASH_VERB"


def begin(verb: str) -> None:
    """Store in the environment how this process was started, also for its child processes.

    The help texts in `conf/*.yaml` read the name of the command from the variable FLASH_COMMAND.
    """
    if Path(sys.argv[0]).name == f"{verb}.py":
        os.environ[_FROM_SCRIPTS] = "1"
    else:
        os.environ.pop(_FROM_SCRIPTS, None)
    os.environ[_VERB] = verb
    os.environ["FLASH_COMMAND"] = command(verb)


def inherited_verb() -> str | None:
    """Return the command of the main process in a further rank of its run, else None.

    Lightning starts further ranks with the program and the arguments that Hydra knows, without the
    command in between.
    """
    return None if is_main_process() else os.environ.get(_VERB)


def this_verb() -> str:
    """Return the command of this process, such as `train`."""
    return os.environ[_VERB]


def command(verb: str) -> str:
    """Return `python VERB.py` if this process was started by a script, else `flash VERB`."""
    if os.environ.get(_FROM_SCRIPTS) and verb in SCRIPTS:
        return f"python {verb}.py"
    return f"flash {verb}"


def this_command() -> str:
    """Return the command line of this process, to be typed again."""
    start = os.environ.get("FLASH_COMMAND") or "flash"
    return " ".join([start, *map(shlex.quote, sys.argv[1:])])


def process_of(arguments: Sequence[str]) -> list[str]:
    """Return the program and the arguments of a process that runs this command with others.

    Args:
        arguments: Overrides, in place of those of this process.
    """
    spec = sys.modules["__main__"].__spec__
    by_module = spec is not None  # python -m flash
    program = ["-m", spec.name.removesuffix(".__main__")] if by_module else [sys.argv[0]]
    verb = [] if os.environ.get(_FROM_SCRIPTS) else [this_verb()]
    return [sys.executable, *program, *verb, *arguments]
