"""Collection of the dataset of the latency benchmarks: whole models of the paper's space.

`python benchmarks/flash_space.py` measures, in `space=flash`, 24 stratified architectures and the
backbone, then the grid of blocks, and adds them to `benchmarks/data/flash_space.jsonl`: prefill at
512 and 2048 tokens, decode at 512 and 1536, 8da4w g32, one thread. It takes hours, can be stopped
and restarted at any time, and repeats imprecise measurements.

Code that only reads the dataset calls `recorded`, on whatever machine.
"""

import argparse
import dataclasses
import json
import logging
from functools import cached_property
from pathlib import Path

from record import SMOKE, Recorder, output

import conf
from flash.arch import ArchSpec
from flash.device.factory import open_device
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.latency.fit import grid_subjects, make_grid, make_profiler, whole_models
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore, StoredLatency, SubjectKind
from flash.lowering.settings import LoweringSettings

STORE = conf.ROOT / "benchmarks" / "data" / "flash_space.jsonl"
CACHE = output(conf.ROOT / "runs" / "lowered")
MODELS = 24
PROGRAMS = LoweringSettings(max_context=2048)
"""The form of the measured programs."""
DEVICE = DeviceSettings(
    name="host",
    processes=3,
    warmups=1,
    runs=1,
    run_timeout_s=300.0,
    lowering=PROGRAMS,
    workload=Workload(prompts=[512, 2048], contexts=[512, 1536]),
)
SETTINGS = LatencySettings(group_size=4, precision_pct=1.0, attempts=5)


def models(space: str = "flash", num: int = MODELS) -> list[ArchSpec]:
    """Return architectures that are stratified over a space; the backbone is the last."""
    return whole_models(conf.space(space), conf.space(space).base, num, seed=0)


class Recorded(Profiler):
    """Profiler that finds a measurement by its subject and its point, on whatever machine."""

    def attempts(self, subject: Subject, point: Point) -> list[StoredLatency]:
        return self._rows[subject.kind, json.dumps(subject.to_dict(), sort_keys=True), point]

    @cached_property
    def _rows(self) -> dict[tuple[SubjectKind, str, Point], list[StoredLatency]]:
        found: dict[tuple[SubjectKind, str, Point], list[StoredLatency]] = {}
        for row in self.store:
            key = row.kind, json.dumps(row.subject, sort_keys=True), point_of(row)
            found.setdefault(key, []).append(row)
        return found


def point_of(row: StoredLatency) -> Point:
    """Return the point at which a latency was measured."""
    return Point(Phase(row.conditions.point["phase"]), row.conditions.point["tokens"])


def open_bench(
    space: str, settings: DeviceSettings, latency: LatencySettings, store: Path, cache_dir: Path
) -> Profiler:
    """Open the profiler of a space over a store."""
    return make_profiler(
        backbone=conf.space(space).base,
        device=open_device(settings),
        workload=settings.workload,
        lowering=settings.lowering,
        settings=latency,
        store=MeasurementStore(store),
        cache_dir=cache_dir,
    )


def recorded(store: Path = STORE) -> Recorded:
    """Open the dataset, or a former one."""
    bench = open_bench("flash", DEVICE, SETTINGS, store, CACHE)
    values = {f.name: getattr(bench, f.name) for f in dataclasses.fields(bench)}
    return Recorded(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models-only", action="store_true", help="leave out the blocks")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    space, device, latency, num = "flash", DEVICE, SETTINGS, MODELS
    if SMOKE:
        space, device, num = "tiny", conf.small_device(DEVICE), 1
        latency = LatencySettings(group_size=4, grid_widths=2, grid_ffn=2, attempts=1)
    bench = open_bench(space, device, latency, output(STORE), arguments.cache)
    bench.measure_missing([Subject(spec=spec) for spec in models(space, num)])
    if not arguments.models_only:
        backbone = conf.space(space).base
        grid = make_grid(conf.space(space), backbone, latency)
        bench.measure_missing(grid_subjects(grid, backbone))
    Recorder("flash_space").add("dataset", "measurements", [len(bench.store)], "rows")


if __name__ == "__main__":
    main()
