"""The frontier as files: one architecture YAML a member for Hydra, one JSON for the report."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash.errors import InputError
from flash.files import write_text
from flash.search.loop import frontier, hypervolume_history
from flash.search.pareto import choose_winners
from flash.search.study import Trial


def write_frontier(folder: Path, study: str, trials: Sequence[Trial]) -> list[Path]:
    """Write `<study>_<rank>.yaml` for every trial on the frontier, rank 0 the fastest.

    With `folder` = `conf/arch`, `+arch=<study>_0` selects the fastest. Files of an earlier, longer
    frontier of the same study are removed.

    Returns:
        The files, by rank.

    Raises:
        InputError: A file to be written exists and is not this study's.
    """
    mark = f"# Frontier of the search study {study}"
    stale = {
        path
        for path in folder.glob(f"{study}_*.yaml")
        if re.fullmatch(rf"{re.escape(study)}_\d+", path.stem)
        and path.read_text().partition(":")[0] == mark
    }
    front = frontier(trials)
    paths = [folder / f"{study}_{rank}.yaml" for rank in range(len(front))]
    for path in paths:
        if path.exists() and path not in stale:
            raise InputError(
                f"search.study={study}: expected {path} to be free, but something else wrote it; "
                "move it or choose another study"
            )
    for path, trial in zip(paths, front, strict=True):
        header = (
            f"{mark}: trial {trial.number}, loss {trial.loss:.4f} nats a token,\n"
            f"# predicted latency {trial.latency_ms:.1f} ms. Overwritten by the next search.\n"
        )
        write_text(path, header + yaml.safe_dump(trial.spec.to_dict(), sort_keys=False))
    for path in stale.difference(paths):
        path.unlink()
    return paths


def write_report(
    path: Path,
    study: str,
    trials: Sequence[Trial],
    reference: tuple[float, float],
    num_winners: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `frontier.json`: all trials, the frontier, the winners, the hypervolume over time.

    `frontier` and `winners` are trial numbers: the frontier fastest first, the winners by what
    each adds to the hypervolume. `about` holds further keys. Returns what was written.
    """
    front = frontier(trials)
    points = [trial.point for trial in front]
    report = {
        **about,
        "study": study,
        "reference": {"loss": reference[0], "latency_ms": reference[1]},
        "frontier": [trial.number for trial in front],
        "winners": [front[i].number for i in choose_winners(points, reference, num_winners)],
        "hypervolume": hypervolume_history(trials, reference),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "loss": trial.loss,
                "latency_ms": trial.latency_ms,
                "spec": trial.spec.to_dict(),
                "extra": trial.extra,
            }
            for trial in trials
        ],
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
    return report
