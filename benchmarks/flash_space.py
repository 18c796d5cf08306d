"""Collection of the dataset of the latency benchmarks: whole models of the paper's space.

`python benchmarks/flash_space.py` measures, in `space=flash`, 24 stratified architectures and the
backbone, then the grid of blocks, and adds them to `benchmarks/data/flash_space.jsonl`: prefill at
512 and 2048 tokens, decode at 512 and 1536, 8da4w g32, one thread. It takes hours, can be stopped
and restarted at any time, and repeats imprecise measurements.

Code that only reads the dataset calls `recorded`, which reports the identity of the machine on
which the dataset was measured, whatever machine reads it.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import conf
from flash.arch import ArchSpec, Attention
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.latency.fit import grid_subjects, make_grid, make_profiler, whole_models
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore
from flash.lowering.settings import LoweringSettings

STORE = conf.ROOT / "benchmarks" / "data" / "flash_space.jsonl"
MODELS = 24
DEVICE = DeviceSettings(
    name="host",
    processes=3,
    warmups=1,
    runs=1,
    run_timeout_s=300.0,
    lowering=LoweringSettings(max_context=2048),
    workload=Workload(prompts=[512, 2048], contexts=[512, 1536]),
)
SETTINGS = LatencySettings(group_size=4, precision_pct=1.5, attempts=5)


def models() -> list[ArchSpec]:
    """Return the architectures of the dataset; the backbone is the last."""
    return whole_models(conf.space("flash"), conf.flash_backbone(), MODELS, seed=0)


class Recorded(HostDevice):
    """Device with the identity of the machine on which the dataset was measured."""

    def _identify(self) -> dict[str, str | int]:
        return next(iter(MeasurementStore(STORE))).conditions.device


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
    """Open the dataset, whose reference program is one layer of the backbone."""
    one_layer = conf.flash_backbone().as_program()
    one_layer = one_layer.replace(layer_types=(Attention.full_attention,))
    bench = open_bench(Recorded(DEVICE), STORE)
    return dataclasses.replace(bench, reference=Subject(spec=one_layer))


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
