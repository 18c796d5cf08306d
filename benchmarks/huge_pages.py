"""Latency with the memory of the process in huge pages, as glibc takes them when asked to.

Fresh processes with and without `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` take turns; each loads
flash_350m (random weights, 8da4w in groups of 32, fp32 cache) on one thread. The kernel must give
huge pages on request (`madvise` or `always` in /sys/kernel/mm/transparent_hugepage/enabled).

Cases are points. `ms` is the least time with the usual pages, `speedup` that time divided by the
one in huge pages, pair by pair.

`python benchmarks/huge_pages.py smoke` runs everything at a small size and keeps no results.
"""

import os
import sys
import tempfile
from pathlib import Path

from record import Recorder

import conf
from flash.arch import ArchSpec, parse_pattern
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder

TUNABLES = "GLIBC_TUNABLES"
PAGES = {"usual": None, "huge": "glibc.malloc.hugetlb=1"}
WORKLOAD, TURNS = Workload(prompts=[512], contexts=[128, 2048]), 5
SMOKE = Workload(prompts=[16], contexts=[8], decode_tokens=2)


def measure(device: HostDevice, program: Program, tunables: str | None) -> dict[str, float]:
    """Measure all points in a fresh process [ms]."""
    if tunables is not None:
        os.environ[TUNABLES] = tunables
    try:
        [measured] = device.measure([program], device.settings.workload)
    finally:
        os.environ.pop(TUNABLES, None)
    return {name: latency.ms for name, latency in measured.latencies.items()}


def compare(record: Recorder, spec: ArchSpec, workload: Workload, turns: int) -> None:
    lowering = LoweringSettings(max_context=workload.context)
    device = HostDevice(
        DeviceSettings(
            name="host", processes=1, warmups=1, runs=1, lowering=lowering, workload=workload
        )
    )
    found: dict[str, list[dict[str, float]]] = {pages: [] for pages in PAGES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pte")
        write(path, lower(Decoder(spec), lowering))
        program = Program(name="model", path=path, vocab_size=spec.vocab_size)
        for _ in range(turns):
            for pages, tunables in PAGES.items():
                found[pages].append(measure(device, program, tunables))
    for point in found["usual"][0]:
        usual, huge = ([run[point] for run in found[pages]] for pages in PAGES)
        record.add(point, "ms", usual, "ms")
        speedups = [before / after for before, after in zip(usual, huge, strict=True)]
        record.add(point, "speedup", speedups, "ratio")


def main() -> None:
    """Run all points; `smoke` at a small size."""
    record, spec = Recorder("huge_pages"), conf.winner("flash_350m")
    if sys.argv[1:] == ["smoke"]:
        spec = spec.replace(
            layer_types=parse_pattern("F"), model_dim=128, ffn_dim=128, vocab_size=512
        )
        compare(record, spec, SMOKE, turns=1)
        return
    compare(record, spec, WORKLOAD, TURNS)
    record.close()


if __name__ == "__main__":
    main()
