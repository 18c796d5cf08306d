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

import conf
from flash.arch import ArchSpec
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.latency.fit import grid_subjects, make_grid, make_profiler, whole_models
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore, StoredLatency, SubjectKind
from flash.lowering.settings import AttentionForm, LoweringSettings

STORE = conf.ROOT / "benchmarks" / "data" / "flash_space.jsonl"
MODELS = 24
PROGRAMS = LoweringSettings(
    attention=AttentionForm.sdpa, prefill_last_only=False, max_context=2048, prefill_chunk=1024
)
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
SETTINGS = LatencySettings(group_size=4, precision_pct=1.5, attempts=5)


def models() -> list[ArchSpec]:
    """Return the architectures of the dataset; the backbone is the last."""
    return whole_models(conf.space("flash"), conf.flash_backbone(), MODELS, seed=0)


class Recorded(Profiler):
    """Profiler that finds a measurement by its subject and its point, and measures nothing.

    The keys of the dataset are those of an earlier version of the lowering.
    """

    def attempts(self, subject: Subject, point: Point) -> list[StoredLatency]:
        return self._rows[subject.kind, json.dumps(subject.to_dict(), sort_keys=True), point]

    @cached_property
    def _rows(self) -> dict[tuple[SubjectKind, str, Point], list[StoredLatency]]:
        found: dict[tuple[SubjectKind, str, Point], list[StoredLatency]] = {}
        for row in self.store:
            point = Point(Phase(row.conditions.point["phase"]), row.conditions.point["tokens"])
            key = row.kind, json.dumps(row.subject, sort_keys=True), point
            found.setdefault(key, []).append(row)
        return found


def open_bench(
    device: Device, store: Path, cache_dir: Path = conf.ROOT / "runs" / "lowered"
) -> Profiler:
    """Open a profiler over a store."""
    return make_profiler(
        backbone=conf.flash_backbone(),
        device=device,
        workload=device.settings.workload,
        lowering=device.settings.lowering,
        settings=SETTINGS,
        store=MeasurementStore(store),
        cache_dir=cache_dir,
    )


def recorded() -> Profiler:
    """Open the dataset."""
    bench = open_bench(open_device(DEVICE), STORE)
    values = {f.name: getattr(bench, f.name) for f in dataclasses.fields(bench)}
    return Recorded(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models-only", action="store_true", help="leave out the blocks")
    parser.add_argument("--cache", type=Path, default=conf.ROOT / "runs" / "lowered")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    bench = open_bench(open_device(DEVICE), STORE, arguments.cache)
    bench.measure_missing([Subject(spec=spec) for spec in models()])
    if not arguments.models_only:
        grid = make_grid(conf.space("flash"), conf.flash_backbone(), SETTINGS)
        bench.measure_missing(grid_subjects(grid, conf.flash_backbone()))


if __name__ == "__main__":
    main()
