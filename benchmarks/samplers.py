"""Sample efficiency of the samplers on the tabular benchmark of benchmarks/tabular.py.

The table holds every member of the space, so samplers search as usual: all proposals have been
trained, and nothing is mapped or interpolated. Cases are the samplers, each with the same start-up
design of 16 trials, batches of 4 and 20 seeds. The metrics `hypervolume_25`, `_50`, `_100` and
`_200` are the hypervolume after that many trials as a share of that of the true frontier (medians;
the spread is the interquartile range). The reference point is that of a search: 0.6 nats above the
largest member, at its latency. `share_of_table` is the number of trials relative to the size of the
space.

`python benchmarks/samplers.py [CASE ...]` prints the results; without cases it also keeps them.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import optuna
import tabular
from optuna.trial import TrialState
from record import SMOKE, Recorder

from flash.arch import ArchSpec
from flash.progress import progress
from flash.search.objectives import Objective, Problem
from flash.search.pareto import hypervolume
from flash.search.sampler import largest, propose
from flash.search.settings import Sampler, SearchSettings
from flash.search.trial import Trial

SEEDS, BUDGETS, POOL = (1, (17, 20), 64) if SMOKE else (20, (25, 50, 100, 200), 512)
SETTINGS = SearchSettings(study="table", batch=4, startup_trials=16, pool_size=POOL)


class Table:
    """Table of the loss and the latency of every member of the space."""

    def __init__(self) -> None:
        self.space = tabular.space()
        rows = [row for row in tabular.read() if row["seed"] == 0 and row["loss"] is not None]
        self.loss = {row["spec"]: row["loss"] for row in reversed(rows)}
        self.prefill_ms = {row["spec"]: row["prefill_ms"] for row in rows}
        missing = [spec for spec in tabular.members(self.space) if spec not in self.loss]
        if missing:
            raise SystemExit(
                f"{tabular.path()}: {len(missing)} of {self.space.count()} members are missing; "
                "run benchmarks/tabular.py"
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
    cases = [Sampler[name] for name in sys.argv[1:]] or list(Sampler)
    record, table = Recorder("samplers"), Table()
    total = table.volume(list(table.loss))
    for sampler in cases:
        runs = [
            table.run(sampler, BUDGETS[-1], seed) for seed in progress(range(SEEDS), sampler.name)
        ]
        for budget in BUDGETS:
            shares = [table.volume(specs[:budget]) / total for specs in runs]
            record.add(sampler.name, f"hypervolume_{budget}", shares, "share")
    for budget in BUDGETS:
        record.add("table", f"share_of_table_{budget}", [budget / table.space.count()], "share")
    record.add("table", "seed_noise", _noise(), "nats")
    if len(cases) == len(Sampler):
        record.close()


def _noise() -> list[float]:
    """Compute absolute differences between the losses of a member with two seeds."""
    rows = [row for row in tabular.read() if row["loss"] is not None]
    second = {row["spec"]: row["loss"] for row in rows if row["seed"] == 1}
    return [
        abs(row["loss"] - second[row["spec"]])
        for row in rows
        if row["seed"] == 0 and row["spec"] in second
    ]


if __name__ == "__main__":
    main()
