"""Console command `flash`, which the scripts at the top of the repository call too.

The modules that do the work are imported when it begins, so that help texts and errors about
settings do not wait for the import of torch.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flash import commands
from flash.bundled import CONF
from flash.config import entry, one_line_errors
from flash.dashboards.settings import WorkspaceSettings
from flash.data.settings import PrepareSettings
from flash.errors import InputError, nearest
from flash.evaluation.settings import EvaluateSettings
from flash.export.settings import ExportSettings
from flash.packages import require_packages
from flash.search.settings import SearchJobSettings
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.settings import TrainSettings

# The functions of commands first check the packages that are imported late in their work.


def _logging(logger: LoggerSettings) -> list[str]:
    """Return the packages that a logger needs."""
    return ["wandb"] if logger.kind is LoggerKind.wandb else []


def _train(settings: TrainSettings) -> None:
    recipes = [settings.recipe, *(stage.recipe for stage in settings.then.values())]
    rounding = ["torchao"] if any(recipe.qat for recipe in recipes) else []
    require_packages([*rounding, *_logging(settings.logger)])
    from flash.training.run import train

    train(settings)


def _search(settings: SearchJobSettings) -> None:
    require_packages(["executorch", *_logging(settings.logger)])
    from flash.report.figures import study_figures
    from flash.search.run import run_search

    run_search(settings, figures=study_figures)


def _export(settings: ExportSettings) -> None:
    require_packages(["executorch", *_logging(settings.logger)])
    from flash.export.run import export

    export(settings)


def _evaluate(settings: EvaluateSettings) -> None:
    require_packages(["lm_eval", *_logging(settings.logger)])
    from flash.evaluation.run import evaluate

    evaluate(settings)


def _prepare(settings: PrepareSettings) -> None:
    from flash.data.prepare import prepare

    prepare(settings)


def _workspace(settings: WorkspaceSettings) -> None:
    require_packages(["wandb_workspaces", "wandb"])
    from flash.dashboards.command import make_dashboards

    make_dashboards(settings)


_JOBS: dict[str, Callable[[Any], None]] = {
    "train": _train,
    "search": _search,
    "export": _export,
    "evaluate": _evaluate,
    "prepare": _prepare,
    "workspace": _workspace,
}


def run(verb: str) -> None:
    """Run one configured command with the arguments of this process, then exit.

    Args:
        verb: `train`, `search`, `export`, `evaluate`, `prepare` or `workspace`.
    """
    commands.begin(verb)
    entry(verb, _JOBS[verb])


def _measurements(arguments: Sequence[str]) -> int:
    from flash.latency.command import main

    return main(arguments)


def _report(arguments: Sequence[str]) -> int:
    from flash.report.command import main

    return main(arguments)


def _convert(arguments: Sequence[str]) -> int:
    """Convert a GGUF file to a Hugging Face folder, for use as `backbone.weights`."""
    parser = argparse.ArgumentParser(prog="flash convert", description=_convert.__doc__)
    parser.add_argument("file", type=Path, help="GGUF file of a Llama or Qwen model")
    parser.add_argument("folder", type=Path, help="folder to write; it must not exist")
    options = parser.parse_args(arguments)
    from flash.interop.gguf_folder import convert

    convert(options.file, options.folder)
    print(f"{options.folder}: use it as backbone.weights={options.folder}")
    return 0


def _new(arguments: Sequence[str]) -> int:
    """Create a configuration file in the working directory from one that comes with flash."""
    parser = argparse.ArgumentParser(prog="flash new", description=_new.__doc__)
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
        print(f"{path}: {count:,} architectures; change it, then use it as space={options.name}")
        return 0
    path, source = new_option(options.group, options.name, options.source)
    print(f"{path}: a copy of {options.group}={source}; change it, then use it by its name")
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
    "search": ("frontier of held-out loss and latency for a backbone on a device", None),
    "train": ("continued pretraining of an architecture, weights inherited", None),
    "export": (".pte for ExecuTorch XNNPACK, checked and measured; also hf and gguf", None),
    "evaluate": ("benchmarks of lm-evaluation-harness on a model or its program", None),
    "prepare": ("tokenize a mixture of text into shards, ahead of training", None),
    "measurements": ("export the measurement store as CSV, or merge two stores", _measurements),
    "workspace": ("workspace and report of a W&B project, made or brought up to date", None),
    "report": ("result table and HTML page of a study", _report),
    "convert": ("Hugging Face folder of a GGUF file, for backbone.weights", _convert),
    "new": ("start a configuration file of your own in conf/", _new),
}
"""Help text of each command, and its function; None for commands configured by Hydra."""


def main() -> int:
    """Run the console command `flash` and return its exit code."""
    inherited = commands.inherited_verb()
    if inherited is not None and sys.argv[1:2] != [inherited]:
        run(inherited)
        return 0
    parser = argparse.ArgumentParser(
        prog="flash",
        description="Design language models for phones.",
        epilog="`flash COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (text, _) in _COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    chosen, rest = sys.argv[1:2], sys.argv[2:]
    if chosen and chosen[0] not in _COMMANDS and not chosen[0].startswith("-"):
        hint = nearest(chosen[0], _COMMANDS)
        print(f"error: flash {chosen[0]}: no such command; {hint}", file=sys.stderr)
        return 2
    options, _ = parser.parse_known_args(chosen)
    if options.version:
        from importlib.metadata import version

        print(f"flash {version('mobilellm-flash')}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    del sys.argv[1]  # what is left are the overrides
    commands.begin(options.command)
    handler = _COMMANDS[options.command][1]
    if handler is None:
        run(options.command)
        return 0
    with one_line_errors():
        return handler(rest)
