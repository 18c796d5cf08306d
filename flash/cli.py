"""Console command `flash`, which the scripts at the top of the repository call too.

Modules are imported when they are needed: completion does without Hydra, help texts and errors
about settings do not wait for torch, and Ctrl-C is handled before anything slow begins.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash import commands, terminal
from flash.bundled import CONF
from flash.errors import InputError, nearest, under
from flash.packages import require_packages
from flash.paths import Runs
from flash.ranks import is_main_process

if TYPE_CHECKING:
    from flash.dashboards.settings import WorkspaceSettings
    from flash.data.settings import PrepareSettings
    from flash.evaluation.settings import EvaluateSettings
    from flash.export.settings import ExportSettings
    from flash.search.settings import SearchJobSettings
    from flash.training.settings import LoggerSettings, TrainSettings

# Packages that are imported late in the work of a command are checked first.


def _require(settings: Any, *packages: str) -> None:
    """Check that packages are installed, and the one of the logger."""
    logger: LoggerSettings = settings.logger
    require_packages([*packages, *(["wandb"] if logger.kind.value == "wandb" else [])])


def _require_for_training(settings: "TrainSettings") -> None:
    recipes = [settings.recipe, *(stage.recipe for stage in settings.then.values())]
    _require(settings, *(["torchao"] if any(recipe.qat for recipe in recipes) else []))


def _check_train(settings: "TrainSettings") -> None:
    _require_for_training(settings)
    from flash.training.run import check

    check(settings)


def _train(settings: "TrainSettings") -> None:
    _require_for_training(settings)
    from flash.training.run import train

    result = train(settings)
    if is_main_process():
        folder = Runs(Path(settings.runs)).model(result.name) / "checkpoint"
        terminal.finish([folder], _following("export", f"model={result.name}"))


def _check_search(settings: "SearchJobSettings") -> None:
    _require(settings, "executorch")
    from flash.search.job import check

    check(settings)


def _search(settings: "SearchJobSettings") -> None:
    _require(settings, "executorch")
    from flash.report.figures import study_figures
    from flash.search.run import run_search, winner_names
    from flash.search.settings import SearchStage

    report, runs = run_search(settings, figures=study_figures), Runs(Path(settings.runs))
    if settings.stage is SearchStage.latency:
        folder = runs.latency(settings.device.name)
        made = [folder / "latency.json", folder / "measurements.csv"]
        terminal.finish(made, _following("search", "stage=search"))
        return
    study = runs.study(settings.search.study)
    if settings.stage is SearchStage.promote:
        terminal.finish([study / "promoted.json"], _following("train", "-m", _winners(study)))
        return
    winners = winner_names(report)
    made = [study / "frontier.json", *([study / "winners"] if winners else [])]
    if winners:
        terminal.finish(made, _following("train", "-m", _winners(study)))
    else:
        more = f"search.trials={2 * settings.search.trials}"
        terminal.finish(made, _following("search", f"search.study={study.name}", more))


def _check_export(settings: "ExportSettings") -> None:
    _require(settings, "executorch")
    from flash.export.run import check

    check(settings)


def _export(settings: "ExportSettings") -> None:
    _require(settings, "executorch")
    from flash.export.formats import FILES
    from flash.export.random_weights import RANDOM
    from flash.export.run import export

    result, runs = export(settings), Runs(Path(settings.runs))
    if settings.model == RANDOM:
        terminal.finish([runs.shapes], _following("train"))
        return
    name = result.name if result is not None else settings.name or settings.backbone.name
    made = [runs.export(name) / FILES[kind] for kind in settings.format]
    if result is None:
        following = _following("export", "format=[executorch]", also=_CHOOSES_MODEL)
    else:
        following = _following("evaluate", "format=program", also=_CHOOSES_MODEL)
    terminal.finish(made, following)


def _check_evaluate(settings: "EvaluateSettings") -> None:
    _require(settings, "lm_eval")
    from flash.evaluation.run import check

    check(settings)


def _evaluate(settings: "EvaluateSettings") -> None:
    _require(settings, "lm_eval")
    from flash.evaluation.run import evaluate

    result, runs = evaluate(settings), Runs(Path(settings.runs))
    made = [runs.evaluation(result.name) / f"{result.stem}.json"]
    searched = any(runs.root.glob("studies/*/frontier.json"))
    terminal.finish(made, _following("report" if searched else "search"))


def _check_prepare(settings: "PrepareSettings") -> None:
    from flash.data.prepare import check

    check(settings)


def _prepare(settings: "PrepareSettings") -> None:
    from flash.data.prepare import prepare

    folder = prepare(settings)
    terminal.finish([folder], _following("train", "data=shards", f"data.path={folder}"))


_CARRIED = ("backbone", "device", "logger", "runs")
"""Groups and settings that the next command takes from this one."""
_CHOOSES_MODEL = ("arch", "model", "name", "data")
"""Further ones for a command on the same model."""


def _following(verb: str, *words: str, also: Sequence[str] = ()) -> str:
    """Return the next command, with what this command line has set for that one too.

    Args:
        verb: The next command.
        words: Arguments of it.
        also: Groups and settings to take from this command besides `_CARRIED`.
    """
    from hydra.core.hydra_config import HydraConfig

    from flash.schemas import ROOTS

    known = {field.name for field in dataclasses.fields(ROOTS[verb])} if verb in ROOTS else set()
    same = verb == commands.this_verb()  # with other settings it would be another result
    roots = known if same else known.intersection([*_CARRIED, *also])
    given = {word.partition("=")[0] for word in words}
    carried = [
        word
        for word in HydraConfig.get().overrides.task
        if re.split(r"[.=]", word.lstrip("+"))[0] in roots and word.partition("=")[0] not in given
    ]
    return " ".join([commands.command(verb), *map(shlex.quote, [*carried, *words])])


def _winners(study: Path) -> str:
    """The option that chooses the winners of a study."""
    return f"+arch={(study / 'winners').read_text('utf-8').strip()}"


def _workspace(settings: "WorkspaceSettings") -> None:
    require_packages(["wandb_workspaces", "wandb"])
    from flash.dashboards.command import make_dashboards

    make_dashboards(settings)


_Function = Callable[[Any], None]
_JOBS: dict[str, tuple[_Function, _Function]] = {
    "train": (_train, _check_train),
    "search": (_search, _check_search),
    "export": (_export, _check_export),
    "evaluate": (_evaluate, _check_evaluate),
    "prepare": (_prepare, _check_prepare),
    "workspace": (_workspace, _workspace),
}
"""Functions of each command configured by Hydra: of its work, and of what it checks first."""


def run(verb: str) -> None:
    """Run one configured command with the arguments of this process, then exit.

    Args:
        verb: `train`, `search`, `export`, `evaluate`, `prepare` or `workspace`.
    """
    terminal.begin()
    commands.begin(verb)
    arguments = sys.argv[1:]
    from flash.config import entry, one_line_errors

    with one_line_errors():
        if not {"-h", "--help"}.isdisjoint(arguments):
            from flash.help import help_text

            print(help_text(verb, arguments))
            return
        _check_flags(verb, arguments)
    entry(verb, *_JOBS[verb])


_FLAGS = "cfg", "config-dir", "hydra-help", "info", "multirun", "package", "resolve", "version"
"""Flags of Hydra."""


def _check_flags(verb: str, arguments: Sequence[str]) -> None:
    """Check words such as `--lr`, for which Hydra would print the usage of all its flags.

    Raises:
        InputError: It is no flag.
    """
    for word in arguments:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in _FLAGS:
            raise InputError(
                f"{word}: no such flag; settings are written as KEY=VALUE, see "
                f"{commands.command(verb)} --help"
            )


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
        weights = shlex.quote(f"backbone.weights={options.backbone}")
        following = f"{commands.command('search')} {weights} space={options.name}"
        terminal.finish([path], following)
        return 0
    path, source = new_option(options.group, options.name, options.source)
    print(f"a copy of {options.group}={source}; change it before you use it")
    from flash.schemas import commands_with

    sign, verb = "+" if options.group == "arch" else "", commands_with(options.group)
    following = commands.command(verb[0] if verb else "train")
    terminal.finish([path], f"{following} {sign}{options.group}={options.name}")
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
    return _write_option(group, name, re.sub(r"(?m)^name: \S+$", f"name: {name}", text)), chosen


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
    sizes = f"{spec.num_layers} layers, width {spec.model_dim}, FFN {spec.ffn_dim}"
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
        return _main()
    except BrokenPipeError:  # the reader of a help text has ended
        terminal.drop_output()
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
