"""Repeatability: difference of two measurements of an architecture, at least half an hour apart.

`python benchmarks/repeatability.py --round N` measures 10 architectures of `space=tiny` with the
settings that users get (device=host: three fresh processes of three runs, repeated until the
standard error is small) and 10 of `space=flash` once with the protocol of the latency dataset
(three processes, one run; prefill at 512, decode steps at 1536 and 512), into
benchmarks/data/repeatability_N.jsonl. A killed round resumes with the next group; `--lower` only
prepares the programs, which takes longest. Without arguments the benchmark compares each round of
this machine with the one before.

Cases are `prefill` and `decode` for `space=tiny`, `flash/prefill_512` and so on for the other.
`disagreement_pct` is that of latencies as predictors get them: corrected for the slowdown of the
machine, which the alternating reference program shows (flash.latency.drift.comparable).
`raw_disagreement_pct` is that of the uncorrected smallest times.

Cases `dataset/...` show the accuracy of a whole model as the reference. They compare measurements
of benchmarks/data/one_layer_reference.jsonl at least half an hour apart, a former version of the
latency dataset that was measured beside one layer: `raw_pct` without correction;
`stand_in_1.03_pct` divided by the slowdown of another whole model of the same group, if that
exceeds 3 %.
"""

import argparse
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import flash_space
from record import SMOKE, Recorder, output

import conf
from flash.arch import ArchSpec
from flash.device.settings import DeviceSettings
from flash.device.workload import Point
from flash.latency.drift import comparable
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore, StoredLatency
from flash.progress import progress

DATA = output(flash_space.STORE.parent)
ONE_LAYER = flash_space.STORE.with_name("one_layer_reference.jsonl")
APART_S, ARCHITECTURES, SPACES = (0, 1, ("tiny",)) if SMOKE else (1800, 10, ("tiny", "flash"))
ROUNDS = (1, 2) if SMOKE else ()
"""Rounds to measure before the comparison."""
NOISES = (1.0, 1.03, 1.06)


def models(space: str) -> list[ArchSpec]:
    """Draw architectures that are stratified over the space."""
    num = flash_space.MODELS if space == "flash" else ARCHITECTURES
    return flash_space.models(space, num)[:ARCHITECTURES]


def device_of(space: str) -> DeviceSettings:
    """Return the device with the workload and the protocol for a space."""
    if space == "tiny":
        return conf.host()
    workload = dataclasses.replace(flash_space.DEVICE.workload, prompts=[512])
    return dataclasses.replace(flash_space.DEVICE, workload=workload)


def bench(space: str, store: Path) -> Profiler:
    """Open the profiler of a space."""
    settings = LatencySettings(attempts=1) if SMOKE else LatencySettings()
    if space == "flash":
        settings = dataclasses.replace(flash_space.SETTINGS, attempts=1)
    device = device_of(space)
    return flash_space.open_bench(space, device, settings, store, flash_space.CACHE)


def attempts(
    rounds: list[MeasurementStore], spec: ArchSpec, point: Point
) -> list[list[StoredLatency]]:
    """Return the measurements of an architecture in each round, under the last one's conditions."""
    subject = Subject(spec=spec).to_dict()
    found = [
        [row for row in each if row.subject == subject and flash_space.point_of(row) == point]
        for each in rounds
    ]
    last = next((rows[-1].conditions for rows in reversed(found) if rows), None)
    return [[row for row in rows if row.conditions == last] for rows in found]


def compare(record: Recorder, space: str, rounds: list[Path]) -> None:
    """Compare each round with the one before at every point of the workload of a space."""
    stores = [MeasurementStore(path) for path in rounds]
    for point in device_of(space).workload.points:
        by_model = [attempts(stores, spec, point) for spec in models(space)]
        known = [rows for of_model in by_model for rows in of_model if rows]
        values = dict(zip(map(id, known), comparable(known, point.phase)[0].tolist(), strict=True))
        corrected, raw = [], []
        for of_model in by_model:
            for a, b in itertools.pairwise(of_model):
                if a and b and min(map(_time_s, b)) - max(map(_time_s, a)) >= APART_S:
                    corrected.append(_apart_pct(values[id(a)], values[id(b)]))
                    raw.append(_apart_pct(_smallest_ms(a), _smallest_ms(b)))
        assert len(corrected) >= ARCHITECTURES, "make two rounds, half an hour apart"
        case = point.phase.value if space == "tiny" else f"{space}/{point.name}"
        record.add(case, "disagreement_pct", corrected, "%")
        record.add(case, "largest_disagreement_pct", [max(corrected)], "%")
        record.add(case, "raw_disagreement_pct", raw, "%")


def stand_in(record: Recorder, point: Point) -> None:
    """Compute the disagreements of the dataset with another whole model as the reference."""
    dataset = flash_space.recorded(ONE_LAYER)
    rows = {spec: dataset.attempts(Subject(spec=spec), point) for spec in flash_space.models()}
    best = {spec: min(map(_ms, of)) for spec, of in rows.items()}
    groups: dict[str, dict[ArchSpec, StoredLatency]] = {}
    for spec, of in rows.items():
        for row in of:
            groups.setdefault(_group(row), {})[spec] = row
    raw: list[float] = []
    corrected: dict[float, list[float]] = {noise: [] for noise in NOISES}
    for spec, of in rows.items():
        for a, b in itertools.pairwise(of):
            if _time_s(b) - _time_s(a) < APART_S:
                continue
            raw.append(_apart_pct(_ms(a), _ms(b)))
            beside_a, beside_b = groups[_group(a)], groups[_group(b)]
            for other in (beside_a.keys() & beside_b.keys()) - {spec}:
                slow_a, slow_b = (_ms(each[other]) / best[other] for each in (beside_a, beside_b))
                for noise, differences in corrected.items():
                    calm_a = _ms(a) / max(1.0, slow_a / noise)
                    differences.append(_apart_pct(calm_a, _ms(b) / max(1.0, slow_b / noise)))
    record.add(f"dataset/{point.name}", "raw_pct", raw, "%")
    for noise, differences in corrected.items():
        record.add(f"dataset/{point.name}", f"stand_in_{noise:.2f}_pct", differences, "%")


def _group(row: StoredLatency) -> str:
    """Return a key shared by measurements taken in the same processes."""
    return str([each["started"] for each in row.result["conditions"]])


def _ms(row: StoredLatency) -> float:
    return row.result["ms"]


def _apart_pct(a: float, b: float) -> float:
    return 200 * abs(a - b) / (a + b)


def _smallest_ms(rows: list[StoredLatency]) -> float:
    return min(map(_ms, rows))


def _time_s(row: StoredLatency) -> float:
    return datetime.fromisoformat(row.time_utc).timestamp()


def measure(number: int | None, spaces: Sequence[str], *, lower_only: bool = False) -> None:
    """Measure a round, or only lower what it needs."""
    for space in spaces:
        measuring = bench(space, DATA / f"repeatability_{number}.jsonl")
        subjects = [Subject(spec=spec) for spec in models(space)]
        assert measuring.reference is not None
        for subject in progress([*subjects, measuring.reference], "programs"):
            measuring.lowered(subject)
        if not lower_only:
            measuring.measure_missing(subjects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--round", type=int, metavar="N", help="measure; do not compare")
    parser.add_argument("--lower", action="store_true", help="only lower what will be measured")
    parser.add_argument("--space", choices=SPACES, nargs="*", default=SPACES)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.lower or arguments.round is not None:
        measure(arguments.round, arguments.space, lower_only=arguments.lower)
        return
    for number in ROUNDS:
        measure(number, arguments.space)
    record = Recorder("repeatability")
    for space in arguments.space:
        compare(record, space, sorted(DATA.glob("repeatability_*.jsonl")))
    for point in flash_space.DEVICE.workload.points:
        stand_in(record, point)
    record.close()


if __name__ == "__main__":
    main()
