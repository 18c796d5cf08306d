"""Work of the commands that Hydra configures: checks, the work itself, and what comes next.

Modules that do the work are imported when it begins, so that errors about settings do not wait for
the import of torch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash import commands, terminal
from flash.packages import require_packages
from flash.paths import Runs
from flash.ranks import is_main_process

if TYPE_CHECKING:
    from flash.dashboards.settings import WorkspaceSettings
    from flash.data.settings import PrepareSettings
    from flash.evaluation.settings import EvaluateSettings
    from flash.export.settings import ExportSettings
    from flash.search.settings import SearchJobSettings
    from flash.tracking.settings import LoggerSettings
    from flash.training.settings import TrainSettings

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


def _require_for_search(settings: "SearchJobSettings") -> None:
    _require(settings, "executorch", *(["lm_eval"] if settings.search.tasks else []))


def _check_search(settings: "SearchJobSettings") -> None:
    _require_for_search(settings)
    from flash.search.job import check

    check(settings)


def _search(settings: "SearchJobSettings") -> None:
    _require_for_search(settings)
    from flash.report.figures import study_figures
    from flash.search.printing import winner_names
    from flash.search.run import run_search
    from flash.search.settings import SearchStage

    report, runs = run_search(settings, figures=study_figures), Runs(Path(settings.runs))
    if settings.stage is SearchStage.latency:
        folders = [runs.latency(device.name) for device in settings.all_devices]
        files = ("latency.json", "measurements.csv")
        made = [folder / name for folder in folders for name in files]
        terminal.finish(made, _following("search", "stage=search"))
        return
    study = runs.study(settings.search.study)
    if settings.stage is SearchStage.promote:
        finished = (study / "winners").is_file()  # also an unfinished search has a frontier
        following = (
            _following("train", "-m", _winners(study))
            if finished
            else _following("search", "stage=search")
        )
        terminal.finish([study / "promoted.json"], following)
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
        own = [] if name == settings.backbone.name else [commands.override("name", name)]
        following = _following("evaluate", *own, "format=program", also=_CHOOSES_MODEL)
    terminal.finish(made, following)


def _check_evaluate(settings: "EvaluateSettings") -> None:
    _require(settings, "lm_eval")
    from flash.evaluation.run import check
    from flash.export.found import find_program

    check(settings, find_program)


def _evaluate(settings: "EvaluateSettings") -> None:
    _require(settings, "lm_eval")
    from flash.evaluation.run import evaluate
    from flash.export.found import find_program

    result, runs = evaluate(settings, find_program), Runs(Path(settings.runs))
    made = [runs.evaluation(result.name) / f"{result.stem}.json"]
    searched = any(runs.root.glob("studies/*/frontier.json"))
    terminal.finish(made, _following("report" if searched else "search"))


def _check_prepare(settings: "PrepareSettings") -> None:
    from flash.data.prepare import check

    check(settings)


def _prepare(settings: "PrepareSettings") -> None:
    from flash.data.prepare import prepare

    folder = prepare(settings)
    path = commands.override("data.path", folder)
    terminal.finish([folder], _following("train", "data=shards", path))


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
    from flash.schemas import ROOTS

    # The report, which Hydra does not configure, takes `runs=` too.
    known = {field.name for field in dataclasses.fields(ROOTS[verb])} if verb in ROOTS else {"runs"}
    same = verb == commands.this_verb()  # with other settings it would be another result
    roots = known if same else known.intersection([*_CARRIED, *also])
    return commands.following(verb, words, {*roots, "experiment"})


def _winners(study: Path) -> str:
    """The option that chooses the winners of a study."""
    return f"+arch={(study / 'winners').read_text('utf-8').strip()}"


def _check_workspace(settings: "WorkspaceSettings") -> None:
    require_packages(["wandb_workspaces", "wandb"])


def _workspace(settings: "WorkspaceSettings") -> None:
    _check_workspace(settings)
    from flash.dashboards.command import make_dashboards

    make_dashboards(settings)


_Function = Callable[[Any], None]
JOBS: dict[str, tuple[_Function, _Function]] = {
    "train": (_train, _check_train),
    "search": (_search, _check_search),
    "export": (_export, _check_export),
    "evaluate": (_evaluate, _check_evaluate),
    "prepare": (_prepare, _check_prepare),
    "workspace": (_workspace, _check_workspace),
}
"""Functions of each command configured by Hydra: of its work, and of what it checks first."""
