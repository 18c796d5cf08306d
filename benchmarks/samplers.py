"""Sample efficiency of the samplers on the tabular benchmarks of benchmarks/tabular.py.

The table holds every member of the space, so samplers search as usual: all proposals have been
trained, and nothing is mapped or interpolated. Cases are the samplers, each with the same start-up
design of 16 trials, batches of 4 and 20 seeds. The metrics `hypervolume_25`, `_50`, `_100` and
`_200` are the hypervolume after that many trials as a share of that of the true frontier (medians;
the spread is the interquartile range). The reference point is that of a search: 0.6 nats above the
largest member, at its latency. `share_of_table` is the number of trials relative to the size of the
space.

With the table `tiny_wide` the space has a width for each layer and a choice of key heads. The cases
`uniform/NAME` there search the space with one FFN width for all layers, and `uniform/frontier` is
its true frontier: all are shares of the wide space's.

`python benchmarks/samplers.py [--table TABLE] [CASE ...]` prints the results; without cases it also
keeps them, those of another table under its name.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
import optuna
import tabular
from optuna.trial import TrialState
from record import SMOKE, Recorder

from flash.arch import ArchSpec, SpaceSettings
from flash.progress import progress
from flash.search.objectives import Objective, Problem
from flash.search.pareto import hypervolume
from flash.search.sampler import largest, propose
from flash.search.settings import Sampler, SearchSettings
from flash.search.trial import Trial

SEEDS, BUDGETS, POOL = (1, (17, 20), 64) if SMOKE else (20, (25, 50, 100, 200), 512)
SETTINGS = SearchSettings(study="table", batch=4, startup_trials=16, pool_size=POOL)


class Table:
    """Table of the loss and the latency of every member of a space.

    Args:
        name: Name of the table.
        space: Space to search; None is the first one of the table.
    """

    def __init__(self, name: str = "tiny_tabular", space: SpaceSettings | None = None) -> None:
        self.space = tabular.space(space or tabular.TABLES[name][0])
        rows = [row for row in tabular.read(name) if row["seed"] == 0 and row["loss"] is not None]
        self.loss = {row["spec"]: row["loss"] for row in reversed(rows)}
        self.prefill_ms = {row["spec"]: row["prefill_ms"] for row in rows}
        missing = [spec for spec in tabular.members(self.space) if spec not in self.loss]
        if missing:
            raise SystemExit(
                f"{tabular.path(name)}: {len(missing)} of {self.space.count()} members missing; "
                f"run benchmarks/tabular.py {name}"
            )
        top = largest(self.space)
        objectives = (Objective.quality, Objective.prefill)
        costs = {"prefill_ms": self.prefill_ms[top]}
        self.problem = Problem(
            costs=self.costs,
            objectives=objectives,
            reference=SETTINGS.worst(objectives, {**costs, "loss": self.loss[top]}, {}),
            limits={},
        )

    def costs(self, specs: Sequence[ArchSpec]) -> dict[str, np.ndarray]:
        return {"prefill_ms": np.array([self.prefill_ms[spec] for spec in specs])}

    @property
    def members(self) -> list[ArchSpec]:
        """All members of the space; the table may have others."""
        return tabular.members(self.space)

    def volume(self, specs: Sequence[ArchSpec]) -> float:
        """Compute the hypervolume of these members."""
        points = [(self.loss[spec], self.prefill_ms[spec]) for spec in specs]
        return hypervolume(points, self.problem.reference)

    def run(
        self, sampler: Sampler, trials: int, seed: int, problem: Problem | None = None
    ) -> list[ArchSpec]:
        """Run a search, of the table's problem or of another; return its members in order."""
        problem = problem or self.problem
        settings = dataclasses.replace(SETTINGS, sampler=sampler)
        done: list[Trial] = []
        while len(done) < trials:
            wanted = min(settings.batch if done else settings.startup_trials, trials - len(done))
            specs = propose(self.space, done, wanted, problem=problem, settings=settings, seed=seed)
            if not specs:  # the whole space is tried
                break
            done += [
                Trial(
                    number=len(done) + i,
                    spec=spec,
                    costs={key: float(values[0]) for key, values in problem.costs([spec]).items()},
                    state=TrialState.COMPLETE,
                    loss=self.loss[spec],
                    batch=(len(done), len(specs)),
                )
                for i, spec in enumerate(specs)
            ]
        return [trial.spec for trial in done]


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [each.name for each in Sampler]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(names)}")
    parser.add_argument("--table", choices=tabular.TABLES, default="tiny_tabular")
    arguments = parser.parse_args()
    for unknown in set(arguments.cases) - {*names}:
        parser.error(f"CASE {unknown}: expected one of {', '.join(names)}")
    cases = [Sampler[name] for name in arguments.cases] or list(Sampler)
    first, *further = tabular.TABLES[arguments.table]
    record = Recorder("samplers" if not further else f"samplers_{arguments.table}")
    table = Table(arguments.table, first)
    total = table.volume(table.members)
    _search(record, table, cases, total)
    for space in further:
        narrow = Table(arguments.table, space)
        share = narrow.volume(narrow.members) / total
        record.add(f"{space.name}/frontier", "hypervolume", [share], "share")
        _search(record, narrow, cases, total, f"{space.name}/")
    for budget in BUDGETS:
        record.add("table", f"share_of_table_{budget}", [budget / table.space.count()], "share")
    record.add("table", "seed_noise", _noise(arguments.table), "nats")
    if len(cases) == len(Sampler):
        record.close()


def _search(
    record: Recorder, table: Table, cases: Sequence[Sampler], total: float, prefix: str = ""
) -> None:
    """Record what each sampler finds, as a share of a hypervolume."""
    for sampler in cases:
        name = f"{prefix}{sampler.name}"
        runs = [table.run(sampler, BUDGETS[-1], seed) for seed in progress(range(SEEDS), name)]
        for budget in BUDGETS:
            shares = [table.volume(specs[:budget]) / total for specs in runs]
            record.add(name, f"hypervolume_{budget}", shares, "share")


def _noise(table: str) -> list[float]:
    """Compute absolute differences between the losses of a member with two seeds."""
    rows = [row for row in tabular.read(table) if row["loss"] is not None]
    second = {row["spec"]: row["loss"] for row in rows if row["seed"] == 1}
    return [
        abs(row["loss"] - second[row["spec"]])
        for row in rows
        if row["seed"] == 0 and row["spec"] in second
    ]


if __name__ == "__main__":
    main()
