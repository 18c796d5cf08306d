"""Time to propose candidates in the paper's space, with synthetic losses.

- `ask_8_s`: seconds for one batch of 8 with 200 finished trials, median over 3 seeds. The case is
  the sampler.
- `trial_s`: seconds of a trial besides its training, over a search of 64 trials whose losses are
  known at once: planning, commits to the study and early stopping. Cutting the candidate out of the
  backbone comes on top (benchmarks/prune.py).
- `study_10k_s`: seconds to read a study of 10,000 finished trials and to write its report.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState
from record import SMOKE, Recorder

import conf
from flash.arch import ArchSpec, Quantization, SearchSpace, weight_bytes
from flash.device.workload import Point
from flash.latency.cost_model import SpecTable, nominal_work_ms
from flash.lowering.settings import LoweringSettings
from flash.progress import progress
from flash.search.fingerprint import space_fingerprint
from flash.search.frontier import write_report
from flash.search.loop import search
from flash.search.objectives import Objective, Problem
from flash.search.parameters import distributions, parameters
from flash.search.quality import Quality
from flash.search.sampler import propose
from flash.search.settings import Sampler, SearchSettings
from flash.search.study import Study, open_study
from flash.search.trial import Trial
from flash.training.loss_curve import Curve, Watch

MANY, KNOWN, TRIALS, SEEDS = (20, 24, 8, 1) if SMOKE else (10_000, 200, 64, 3)


def costs(specs: list[ArchSpec]) -> dict[str, np.ndarray]:
    """Compute counted work at nominal rates [ms] and the size of the weights [MiB]."""
    lowering, point = LoweringSettings(max_context=2048), Point.parse("prefill_2048")
    work = nominal_work_ms(SpecTable.of(specs), point, lowering, lowering.chunk)
    size = [weight_bytes(spec, Quantization.int8da4w) / 2**20 for spec in specs]
    return {"prefill_ms": work.sum(axis=1), "size_mib": np.array(size)}


def loss(spec: ArchSpec) -> float:
    """Compute a synthetic loss: smooth in the sizes; early attention helps, efficient runs hurt."""
    early = np.exp(-np.linspace(0.0, 2.0, spec.num_layers))
    harm = {"F": 0.0, "S": 0.3, "-": 1.0}
    missing = early @ [harm[letter] for letter in spec.pattern] / early.sum()
    sizes = 12 * spec.model_dim**-0.5 + 10 * spec.ffn_dim**-0.5 + 4 / spec.num_layers
    return float(1.5 + sizes + 0.5 * missing + 0.05 * spec.longest_efficient_run)


def trials(space: SearchSpace, n: int, seed: int) -> list[Trial]:
    """Make n complete trials with synthetic losses."""
    specs = space.stratified(np.random.default_rng(seed), n)
    known = costs(specs)
    return [
        Trial(
            number=i,
            spec=spec,
            costs={key: float(values[i]) for key, values in known.items()},
            state=TrialState.COMPLETE,
            loss=loss(spec),
            batch=(0, len(specs)),
        )
        for i, spec in enumerate(specs)
    ]


def problem(*objectives: Objective) -> Problem:
    """Make a problem whose reference point is above the largest member of the space."""
    space_ = conf.space("flash")
    top = space_.make(2048, 8192, tuple(space_.kinds[:1]) * 16)
    worst = {key: float(values[0]) for key, values in costs([top]).items()}
    return Problem(
        costs=costs,
        objectives=objectives,
        reference=(loss(top) + 0.6, *(worst[o.key] for o in objectives[1:])),
        limits={},
    )


def ask_s(sampler: Sampler, seed: int, *objectives: Objective) -> float:
    """Measure the seconds to propose 8 candidates with 200 finished trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = SearchSettings(study="ask", sampler=sampler)
    asked, given = problem(*objectives), conf.space("flash")
    known = trials(given, KNOWN, seed)
    start = time.perf_counter()
    found = propose(given, known, 8, problem=asked, settings=settings, seed=seed)
    assert len(found) == 8
    return time.perf_counter() - start


def trial_s() -> float:
    """Measure the seconds of each trial of a search that does not train."""
    given = conf.space("flash")
    settings = SearchSettings(study="trials", trials=TRIALS)
    asked = problem(Objective.quality, Objective.prefill)

    def evaluate(spec: ArchSpec, number: int, watch: Watch) -> Quality:
        curve = tuple(loss(spec) * (1 + 1 / part) for part in range(1, 33))
        for part in range(1, 33):
            watch(Curve(curve[:part], 32))
        return Quality(loss(spec), {"curve": [[0, each] for each in curve]})

    with tempfile.TemporaryDirectory() as name:
        opened = open_study(
            Path(name, "study.db"),
            "trials",
            space_fingerprint(given),
            objectives=asked.objectives,
            heartbeat_s=20,
            retries=1,
        )
        start = time.perf_counter()
        done = search(opened, given, evaluate, asked, settings, seed=0)
        return (time.perf_counter() - start) / len(done)


def study_10k_s(asked: Problem) -> float:
    """Measure the seconds to read a study of many trials and to write its report."""
    given = conf.space("flash")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "study.db")

        def opened() -> Study:
            return open_study(
                path,
                "many",
                space_fingerprint(given),
                objectives=asked.objectives,
                heartbeat_s=20,
                retries=1,
            )

        opened()
        fill(path, given, trials(given, MANY, 0), asked)
        start = time.perf_counter()
        found = opened().trials()
        assert len(found) == MANY
        write_report(Path(name, "frontier.json"), "many", found, asked, 3, {})
        return time.perf_counter() - start


def fill(path: Path, space: SearchSpace, many: list[Trial], asked: Problem) -> None:
    """Add finished trials as a search would leave them, without its commit for each."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous=OFF")
    stored = optuna.load_study(study_name="many", storage=storage)
    for trial in progress(many, "filling a study"):
        stored.add_trial(
            optuna.create_trial(
                values=trial.point(asked.objectives),
                params=parameters(space, trial.spec),
                distributions=distributions(space, trial.spec.num_layers),
                user_attrs={
                    "spec": trial.spec.to_dict(),
                    "costs": dict(trial.costs),
                    "batch": list(trial.batch),
                },
            )
        )


def main() -> None:
    record = Recorder("ask")
    two = (Objective.quality, Objective.prefill)
    for sampler in Sampler:
        record.add(
            sampler.name, "ask_8_s", [ask_s(sampler, seed, *two) for seed in range(SEEDS)], "s"
        )
    three = (*two, Objective.size)
    values = [ask_s(Sampler.flash, seed, *three) for seed in range(SEEDS)]
    record.add("flash_3_objectives", "ask_8_s", values, "s")
    record.add("search", "trial_s", [trial_s() for _ in range(SEEDS)], "s")
    record.add("study", "study_10k_s", [study_10k_s(problem(*two))], "s")
    record.close()


if __name__ == "__main__":
    main()
