"""Command lines for messages, as they were typed: script, `flash`, or `python -m flash`."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from flash.bundled import CONF
from flash.errors import without_secrets
from flash.ranks import is_main_process

SCRIPTS = ("train", "search", "export")
"""Commands that have a script at the top of the repository."""
_PROGRAM = "FLASH_PROGRAM"
_VERB = "FLASH_VERB"
_INSTALLED = "flash VERB"
_UNQUOTED = re.compile(r"[\w./:@%+*-]+", re.ASCII)
"""Values that Hydra reads as they are."""


def begin(verb: str) -> None:
    """Store in the environment how this process was started, also for its child processes."""
    started = Path(sys.argv[0])
    if started.name == f"{verb}.py":
        os.environ[_PROGRAM] = f"python {shlex.quote(str(started.with_name('VERB.py')))}"
    elif started.name == "__main__.py":
        os.environ[_PROGRAM] = "python -m flash VERB"
    else:
        os.environ[_PROGRAM] = _INSTALLED
    os.environ[_VERB] = verb


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
    """Return the command `verb` as the user would type it, such as `flash train`.

    It is `python train.py` where the process was started by a script, and `flash` for commands
    without a script.
    """
    program = os.environ.get(_PROGRAM) or _INSTALLED
    if program.endswith(".py") and verb not in SCRIPTS:
        program = _INSTALLED
    return program.replace("VERB", verb)


def this_command() -> str:
    """Return the command line of this process, to be typed again, without passwords and keys."""
    verb = os.environ.get(_VERB)
    start = command(verb) if verb else "flash"
    return without_secrets(" ".join([start, *map(shlex.quote, sys.argv[1:])]))


def override(key: str, value: object) -> str:
    """Return `key=value`, quoted for Hydra where it must be, but not for a shell."""
    text = str(value)
    quoted = text.replace('"', '\\"')
    return f"{key}={text}" if _UNQUOTED.fullmatch(text) else f'{key}="{quoted}"'


def following(verb: str, words: Sequence[str], roots: Collection[str]) -> str:
    """Return a next command, with what the running one was told and that one needs too.

    Args:
        verb: The next command.
        words: Overrides of its own, which take the place of typed ones of the same key.
        roots: Groups and settings whose overrides it takes from the running command, as they were
            typed; a command that Hydra does not run has none.
    """
    from hydra.core.hydra_config import HydraConfig  # not at the start of commands without Hydra

    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = {word.partition("=")[0].lstrip("+") for word in words}
    carried = []
    for word in typed:
        key = word.lstrip("+~").partition("=")[0]
        if re.split(r"[.@]", key)[0] not in roots or key in given:
            continue
        if key == "experiment" and not _has_experiment(verb, word.partition("=")[2]):
            continue
        carried.append(word)
    return " ".join([command(verb), *map(shlex.quote, [*carried, *words])])


def _has_experiment(verb: str, name: str) -> bool:
    """Return True if a command has an experiment, of flash or of the user."""
    places = (folder / verb / "experiment" / f"{name}.yaml" for folder in (CONF, Path("conf")))
    return any(path.is_file() for path in places)


def process_of(arguments: Sequence[str]) -> list[str]:
    """Return the program and the arguments of a process that runs this command with others.

    Args:
        arguments: Overrides, in place of those of this process.
    """
    spec = sys.modules["__main__"].__spec__
    by_module = spec is not None  # python -m flash
    program = ["-m", spec.name.removesuffix(".__main__")] if by_module else [sys.argv[0]]
    verb = [] if Path(sys.argv[0]).name == f"{this_verb()}.py" else [this_verb()]
    return [sys.executable, *program, *verb, *arguments]
