"""One model for several devices, on the tabular truth of benchmarks/tabular.py.

Devices are the counted work of each member of the table at other rates: `nominal`, `attention`
(where attention takes four times as long) and `products` (where matrix products take three times as
long). Each of 10 seeds searches 48 trials for all three (`search.across=max`), and 48 for each
device alone.

Cases of one device: `own_hypervolume` and `joint_hypervolume`, the hypervolume on this device of
the search for it alone and of the one for all, as shares of that of its true frontier.

Case `all`, of models that take at most 60 % of the largest member's time on every device:
`true_price` is by how much the best of the table is worse than the best for a device alone, the
mean over the devices; `joint_regret` by how much the best that the joint search has found is worse
than the best of the table; `separate_regret` the same of the three other searches together, which
train three times as many candidates.

`python benchmarks/devices.py` prints the results and keeps them.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import optuna
from record import SMOKE, Recorder
from samplers import SETTINGS, Table

from flash.arch import ArchSpec
from flash.device.workload import Point
from flash.latency.cost_model import WORK_COLUMNS, SpecTable, nominal_work_ms
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.progress import progress
from flash.search.devices import over_devices
from flash.search.objectives import Costs, Problem
from flash.search.pareto import hypervolume
from flash.search.sampler import largest
from flash.search.settings import Across, Sampler

SEEDS, TRIALS = (1, 18) if SMOKE else (10, 48)
SHARE = 0.6
SLOWER = {
    "nominal": {},
    "attention": dict.fromkeys(("full", "sliding", "mask"), 4.0),
    "products": dict.fromkeys(("ffn_gemm", "attention_gemm", "head"), 3.0),
}
LOWERING = LoweringSettings(attention=AttentionForm.sdpa, prefill_last_only=False)
POINT = Point.parse("prefill_2048")


def times(specs: list[ArchSpec], slower: Mapping[str, float]) -> dict[ArchSpec, float]:
    """Return the latency of each member on a device with these multiples of the work [ms]."""
    work = nominal_work_ms(SpecTable.of(specs), POINT, LOWERING, LOWERING.chunk)
    rates = np.array([slower.get(name, 1.0) for name in WORK_COLUMNS])
    return dict(zip(specs, (work @ rates).tolist(), strict=True))


def costs_of(ms: Mapping[ArchSpec, float]) -> Costs:
    """Return the costs on a device; what stage 1 predicts is known exactly here."""

    def costs(specs: Iterable[ArchSpec]) -> dict[str, np.ndarray]:
        found = np.array([ms[spec] for spec in specs])
        return {"prefill_ms": found, "size_mib": 0 * found, "memory_mib": 0 * found}

    return costs


def problem_of(table: Table, costs: Costs) -> Problem:
    """Return the problem of a search with these costs, with the reference point of the table's."""
    top = largest(table.space)
    known = {"prefill_ms": float(costs([top])["prefill_ms"][0])}
    objectives = table.problem.objectives
    reference = SETTINGS.worst(objectives, {**known, "loss": table.loss[top]}, {})
    return Problem(costs=costs, objectives=objectives, reference=reference, limits={})


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record, table = Recorder("devices"), Table()
    specs = list(table.loss)
    ms = {device: times(specs, slower) for device, slower in SLOWER.items()}
    costs = {device: costs_of(each) for device, each in ms.items()}
    top = largest(table.space)
    alone = {device: problem_of(table, each) for device, each in costs.items()}
    joint = problem_of(table, over_devices(costs, top, Across.max, {}))

    def volume(found: Iterable[ArchSpec], device: str) -> float:
        points = [(table.loss[spec], ms[device][spec]) for spec in found]
        return hypervolume(points, alone[device].reference)

    def best(found: Iterable[ArchSpec], devices: Iterable[str]) -> float:
        limits = {device: SHARE * ms[device][top] for device in devices}
        fast = [s for s in found if all(ms[d][s] <= limit for d, limit in limits.items())]
        return min((table.loss[spec] for spec in fast), default=joint.reference[0])

    own: dict[str, list[list[ArchSpec]]] = {device: [] for device in costs}
    shared = []
    for seed in progress(range(SEEDS), "seeds"):
        shared.append(table.run(Sampler.flash, TRIALS, seed, joint))
        for device, problem in alone.items():
            own[device].append(table.run(Sampler.flash, TRIALS, seed, problem))
    for device in costs:
        total = volume(specs, device)
        for name, runs in (("own", own[device]), ("joint", shared)):
            shares = [volume(run, device) / total for run in runs]
            record.add(device, f"{name}_hypervolume", shares, "share")
    truth = best(specs, costs)
    prices = [truth - best(specs, [device]) for device in costs]
    record.add("all", "true_price", [float(np.mean(prices))], "nats")
    record.add("all", "joint_regret", [best(run, costs) - truth for run in shared], "nats")
    together = [[s for runs in own.values() for s in runs[seed]] for seed in range(SEEDS)]
    record.add("all", "separate_regret", [best(run, costs) - truth for run in together], "nats")
    record.close()


if __name__ == "__main__":
    main()
