"""Files of the frontier: an architecture YAML for each member, and `frontier.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash.arch import distance
from flash.errors import InputError
from flash.records import plain, write_json, write_text
from flash.search.loop import frontier, hypervolume_history
from flash.search.names import arch_name
from flash.search.objectives import Problem
from flash.search.pareto import choose_winners
from flash.search.trial import Trial


def shortlist(front: Sequence[Trial], problem: Problem, k: int) -> list[Trial]:
    """Choose up to k trials of the frontier that differ in their costs and as architectures.

    The first adds most hypervolume; each further one adds most, weighted by the distance of its
    architecture from the nearest before it.
    """
    points = [trial.point(problem.objectives) for trial in front]
    distances = [[distance(a.spec, b.spec) for b in front] for a in front]
    return [front[i] for i in choose_winners(points, problem.reference, k, distances)]


def write_frontier(
    folder: Path, study: str, trials: Sequence[Trial], problem: Problem
) -> list[Path]:
    """Write an architecture file for every trial on the frontier, named by `arch_name`.

    If `folder` is on Hydra's search path as `arch`, `+arch=NAME` selects one. Files of trials that
    have left the frontier stay, as models may have been trained under their names.

    Returns:
        Paths of the files, fastest first.

    Raises:
        InputError: A file to be written exists with another architecture.
    """
    paths = []
    for trial in frontier(trials, problem):
        path = folder / f"{arch_name(study, trial.number, trial.spec)}.yaml"
        costs = ", ".join(f"{key} {value:.4g}" for key, value in trial.costs.items())
        errors = "".join(f", {key} {error.pct:.1f}" for key, error in trial.errors.items())
        text = yaml.safe_dump(trial.spec.to_dict(), sort_keys=False)
        header = (
            f"# Frontier of the search study {study}: trial {trial.number}, loss {trial.loss:.4f} "
            f"nats a token{errors},\n# predicted {costs}.\n"
        )
        if not path.exists():
            write_text(path, header + text)
        elif not path.read_text("utf-8").endswith(f"\n{text}"):
            raise InputError(
                f"search.study={study}: expected {path} to be free, but something else wrote it; "
                "move it or choose another study"
            )
        paths.append(path)
    return paths


def write_report(
    path: Path,
    study: str,
    trials: Sequence[Trial],
    problem: Problem,
    num_winners: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `frontier.json`: all trials, the frontier, the winners, the hypervolume over time.

    The key `latency_ms` of a trial is the headline latency, whatever the objectives are. `frontier`
    and `winners` are lists of trial numbers: the frontier fastest first, the winners in the order
    in which they were chosen (`shortlist`).

    Args:
        path: File to write.
        study: Name of the study.
        trials: All trials of the study.
        problem: Objectives, limits and reference point.
        num_winners: Greatest number of winners.
        about: Further keys of the report.

    Returns:
        The content of the file.
    """
    front = frontier(trials, problem)
    keys = [objective.key for objective in problem.objectives]
    headline = problem.headline
    reference = dict(zip(keys, problem.reference, strict=True))
    report = {
        **about,
        "study": study,
        "objectives": keys,
        "limits": dict(problem.limits),
        "reference": {**reference, "latency_ms": reference.get(headline)},
        "frontier": [trial.number for trial in front],
        "winners": [trial.number for trial in shortlist(front, problem, num_winners)],
        "hypervolume": hypervolume_history(trials, problem),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "loss": trial.loss,
                "latency_ms": trial.costs[headline],
                "errors": plain(trial.errors),
                "costs": dict(trial.costs),
                "spec": trial.spec.to_dict(),
                "extra": trial.extra,
            }
            for trial in trials
        ],
    }
    write_json(path, report)
    return report
