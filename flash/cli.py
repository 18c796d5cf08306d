"""Console command `flash`, which the scripts at the top of the repository call too.

Modules are imported when they are needed: completion does without Hydra, help texts and errors
about settings do not wait for torch, and Ctrl-C is handled before anything slow begins.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flash import commands, terminal
from flash.bundled import CONF
from flash.errors import InputError, nearest, under


def run(verb: str) -> None:
    """Run one configured command with the arguments of this process, then exit.

    Args:
        verb: `train`, `search`, `export`, `evaluate`, `prepare` or `workspace`.
    """
    terminal.begin()
    commands.begin(verb)
    # Threads of OpenMP that wait for each other would spin, and a step of training take several
    # times as long beside other work (benchmarks/busy.py). torch reads it when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:]
    from flash.config import entry, one_line_errors
    from flash.jobs import JOBS

    with one_line_errors():
        if not {"-h", "--help"}.isdisjoint(arguments):
            from flash.help import help_text

            print(help_text(verb, arguments))
            return
        _check_words(verb, arguments)
        arguments = [part for word in arguments for part in each_device(verb, word)]
    # Hydra takes overrides in front of a flag or behind it, but not on both sides.
    sys.argv[1:] = sorted(arguments, key=lambda word: word not in {"-m", "--multirun"})
    entry(verb, *JOBS[verb])


_FLAGS = {
    *("--cfg", "--config-dir", "--hydra-help", "--info", "--multirun", "--package", "--resolve"),
    *("--version", "-c", "-cd", "-i", "-m", "-p"),
}
"""Flags of Hydra, but those that choose other configurations than ours."""


_CALLED = re.compile(r"(?<![A-Za-z0-9])_target_(?![A-Za-z0-9])")
"""Key whose value Hydra calls, anywhere in a word."""


def _check_words(verb: str, arguments: Sequence[str]) -> None:
    """Check words that Hydra would take for what no user of flash means.

    For one such as `--lr` it prints the usage of all its flags; a `_target_` it calls.

    Raises:
        InputError: A word is a flag that does not exist, or names code to call.
    """
    for word in arguments:
        if word.startswith("-") and word.partition("=")[0] not in _FLAGS:
            raise InputError(
                f"{word}: no such flag; settings are written as KEY=VALUE, see "
                f"{commands.command(verb)} --help"
            )
        listed = re.fullmatch(r"\+{0,2}(\w+)=\[.*\]", word, re.DOTALL)
        if listed is not None and listed[1] != "device":
            from flash.help import groups

            if listed[1] in groups(verb):  # Hydra would merge the options into one
                raise InputError(f"{word}: expected the name of one option of {listed[1]}")
        if _CALLED.search(word):
            raise InputError(f"{word}: expected no _target_, which would call code; leave it out")


def each_device(verb: str, word: str) -> list[str]:
    """Return the words that `device=[A,B]` is short for; Hydra would merge the options into one.

    Raises:
        InputError: The command takes one device only.
    """
    if not (word.startswith("device=") and "[" in word):
        return [word]
    found = re.fullmatch(r"device=\[([^\[\]]*)\]", word)
    first, *others = (name.strip() for name in (found[1] if found else "").split(","))
    if not all(re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII) for name in (first, *others)):
        raise InputError(
            f"{word}: expected options of the group device in brackets, as in device=[host,board]; "
            "names of further ones begin with a letter"
        )
    if others and verb != "search":
        raise InputError(
            f"{word}: expected one device, as only {commands.command('search')} takes several"
        )
    if first in others or len(set(others)) < len(others):
        raise InputError(f"{word}: expected each device once")
    return [f"device={first}", *(f"+device@devices.{name}={name}" for name in others)]


def _measurements(arguments: Sequence[str]) -> int:
    from flash.latency.command import main

    return main(arguments)


def _report(arguments: Sequence[str]) -> int:
    from flash.report.command import main

    return main(arguments)


def _convert(arguments: Sequence[str]) -> int:
    """Convert a GGUF file to a Hugging Face folder, for use as `backbone.weights`."""
    parser = argparse.ArgumentParser(prog=commands.command("convert"), description=_convert.__doc__)
    parser.add_argument("file", type=Path, help="GGUF file of a Llama or Qwen model")
    parser.add_argument("folder", type=Path, help="folder to write; it must not exist")
    options = parser.parse_args(arguments)
    from flash.interop.gguf_folder import convert

    convert(options.file, options.folder)
    following = (
        f"{commands.command('new')} space NAME --backbone {shlex.quote(str(options.folder))}"
    )
    terminal.finish([options.folder], following)
    return 0


def _new(arguments: Sequence[str]) -> int:
    """Create a configuration file in the working directory from one that comes with flash."""
    parser = argparse.ArgumentParser(prog=commands.command("new"), description=_new.__doc__)
    parser.add_argument("group", help=f"one of {', '.join(_groups())}")
    parser.add_argument("name", help="name of the new option; the file is conf/GROUP/NAME.yaml")
    parser.add_argument("--from", dest="source", metavar="OPTION", help="option to copy")
    parser.add_argument(
        "--backbone", type=Path, metavar="FOLDER", help="propose a space for this checkpoint"
    )
    options = parser.parse_args(arguments)
    if options.backbone is not None:
        if options.source is not None:
            raise InputError(
                f"--from {options.source}: has no effect with --backbone, which proposes all "
                "values; leave one of the two out"
            )
        path, count = new_space(options.group, options.name, options.backbone)
        print(f"{count:,} architectures; change the file where you know better")
        weights = shlex.quote(commands.override("backbone.weights", options.backbone))
        following = f"{commands.command('search')} {weights} space={options.name}"
        terminal.finish([path], following)
        return 0
    path, source = new_option(options.group, options.name, options.source)
    print(f"a copy of {options.group}={source}; change it before you use it")
    from flash.schemas import commands_with

    verb, _, group = options.group.rpartition("/")  # a group of one command alone has its name
    sign = "+" if group == "arch" else ""
    following = commands.command(verb or next(iter(commands_with(group)), "train"))
    terminal.finish([path], f"{following} {sign}{group}={options.name}")
    return 0


def _completion(arguments: Sequence[str]) -> int:
    """Print a script that makes a shell complete commands, groups, options and settings."""
    from flash.completion import SCRIPTS

    parser = argparse.ArgumentParser(
        prog=commands.command("completion"), description=_completion.__doc__
    )
    parser.add_argument("shell", choices=sorted(SCRIPTS))
    print(SCRIPTS[parser.parse_args(arguments).shell])
    return 0


_STARTING_POINTS = {
    "arch": "flash_350m",
    "backbone": "smollm2_360m",
    "data": "folder",
    "device": "host",
    "recipe": "distill",
    "space": "tiny",
    "trainer": "cpu",
}
"""Option to copy by default, for each group."""


def _groups() -> list[str]:
    """Folders of options; those of one command alone are named as `train/experiment`."""
    found = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")}
    return sorted(group for group in found if not group.startswith("hydra/"))


def new_option(group: str, name: str, source: str | None = None) -> tuple[Path, str]:
    """Write `conf/GROUP/NAME.yaml` in the working directory, as a copy of an option of flash.

    Args:
        group: Configuration group.
        name: Name of the new option.
        source: Option to copy; None takes the default of the group.

    Returns:
        Path of the file, and the name of the copied option.

    Raises:
        InputError: An unknown group or option, or a name that is taken or not allowed.
    """
    options = _options(group)
    chosen = _STARTING_POINTS.get(group, options[0]) if source is None else source
    if chosen not in options:
        raise InputError(f"new {group} --from {chosen}: no such option; {nearest(chosen, options)}")
    text = (CONF / group / f"{chosen}.yaml").read_text("utf-8")
    text = re.sub(r"(?m)^name: \S+$", lambda _: f"name: {name}", text)
    return _write_option(group, name, text), chosen


def new_space(group: str, name: str, backbone: Path) -> tuple[Path, int]:
    """Write `conf/space/NAME.yaml` in the working directory: a space proposed for a backbone.

    Args:
        group: Configuration group as it was typed; only `space` can be proposed.
        name: Name of the new option.
        backbone: Checkpoint folder of the backbone.

    Returns:
        Path of the file, and the number of architectures in the space.

    Raises:
        InputError: Another group, an unusable backbone, or a name that is taken or not allowed.
    """
    if group != "space":
        raise InputError(f"new {group} --backbone {backbone}: expected the group space")
    from flash.arch.proposal import propose_space, space_yaml
    from flash.arch.space import SearchSpace
    from flash.model.weights import read_spec

    with under(f"--backbone {backbone}", ": "):
        if not (backbone / "config.json").is_file():
            raise InputError("expected a Hugging Face folder with config.json, found none")
        spec = read_spec(backbone)
    settings = propose_space(name, spec)
    sizes = f"{spec.num_layers} layers, width {spec.model_dim}, FFN {spec.ffn_range}"
    path = _write_option(group, name, space_yaml(settings, f"{backbone.name} ({sizes})"))
    return path, SearchSpace(settings, spec).count()


def _options(group: str) -> list[str]:
    groups = _groups()
    if group not in groups:
        raise InputError(f"new {group}: expected a group; {nearest(group, groups)}")
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _write_option(group: str, name: str, text: str) -> Path:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is None:
        raise InputError(f"new {group} {name}: expected a name of letters, digits, '_' and '-'")
    if name in _options(group):
        raise InputError(f"new {group} {name}: the name comes with flash; choose another")
    path = Path("conf", group, f"{name}.yaml")
    if path.exists():
        raise InputError(f"{path}: exists; choose another name, or edit it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int] | None]] = {
    "search": ("frontier of held-out loss and latency for a backbone", None),
    "train": ("continued pretraining of an architecture, weights inherited", None),
    "export": (".pte for ExecuTorch, checked and measured; also hf and gguf", None),
    "evaluate": ("benchmarks of lm-evaluation-harness on a model or its program", None),
    "prepare": ("tokenize a mixture of text into shards, ahead of training", None),
    "measurements": ("export the measurement store as CSV, or merge two stores", _measurements),
    "workspace": ("workspace and report of a W&B project, made or brought up to date", None),
    "report": ("result table and HTML page of a study", _report),
    "convert": ("Hugging Face folder of a GGUF file, for backbone.weights", _convert),
    "new": ("start a configuration file of your own in conf/", _new),
    "completion": ("completion of commands and settings in bash, zsh or fish", _completion),
}
"""Help text of each command, and its function; None for commands configured by Hydra."""


HELP = """\
flash: design language models for phones.

Usage:
  flash COMMAND [GROUP=OPTION] [KEY=VALUE] ...

Commands:
{commands}

More:
  flash COMMAND --help         groups, settings and examples of a command
  flash COMMAND --help GROUP   options and settings of a group, such as recipe
  flash --version              version

Begin with `flash search`, which takes the tiny backbone and this machine. Every
command says at its end what it has made, and the command to go on with."""


def _help() -> str:
    listed = "\n".join(f"  {name:12s} {text}" for name, (text, _) in _COMMANDS.items())
    return HELP.format(commands=listed)


def main() -> int:
    """Run the console command `flash` and return its exit code."""
    terminal.begin()
    try:
        code = _main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a help text has ended
        terminal.drop_output()
        return 1
    except OSError as error:  # the disk is full that has the output
        terminal.drop_output()
        print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def _main() -> int:
    inherited = commands.inherited_verb()
    if inherited is not None and sys.argv[1:2] != [inherited]:
        run(inherited)
        return 0
    chosen, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if chosen == "--complete":
        from flash.completion import complete

        print("\n".join(complete(rest)))
        return 0
    if chosen in {"", "-h", "--help"}:
        print(_help())
        return 0 if chosen else 2
    if chosen == "--version":
        from importlib.metadata import version

        print(f"flash {version('mobilellm-flash')}")
        return 0
    if chosen not in _COMMANDS:
        hint = nearest(chosen, _COMMANDS)
        print(f"error: flash {chosen}: no such command; {hint}", file=sys.stderr)
        return 2
    del sys.argv[1]  # what is left are the overrides
    handler = _COMMANDS[chosen][1]
    if handler is None:
        run(chosen)
        return 0
    commands.begin(chosen)
    from flash.config import one_line_errors

    with one_line_errors():
        return handler(rest)
