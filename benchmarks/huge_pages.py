"""Latency and memory with weights in huge pages (`device.huge_pages`).

Fresh processes with and without take turns; each loads flash_350m (random weights, 8da4w in groups
of 32, fp32 cache) on one thread. The kernel must give huge pages on request (`madvise` or `always`
in /sys/kernel/mm/transparent_hugepage/enabled).

Cases are points. `ms` is the least time with the usual pages, `speedup` that time divided by the
one in huge pages, pair by pair; `peak_rss_ratio` is the peak memory with them relative to without.
"""

import dataclasses
import tempfile
from pathlib import Path

from record import SMOKE, Recorder

import conf
from flash.device.host import HostDevice
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder

WORKLOAD, TURNS = Workload(prompts=[512], contexts=[128, 2048]), 5
if SMOKE:
    WORKLOAD, TURNS = Workload(prompts=[16], contexts=[8], decode_tokens=2), 1


def main() -> None:
    record, spec = Recorder("huge_pages"), conf.winner("flash_350m")
    if SMOKE:
        spec = conf.small_spec(spec)
    lowering = LoweringSettings(max_context=WORKLOAD.context)
    settings = DeviceSettings(
        name="host", processes=1, warmups=1, runs=1, lowering=lowering, workload=WORKLOAD
    )
    devices = [HostDevice(dataclasses.replace(settings, huge_pages=huge)) for huge in (False, True)]
    pairs: list[list[Measurement]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pte")
        write(path, lower(Decoder(spec), lowering))
        program = Program(name="model", path=path, vocab_size=spec.vocab_size)
        for _ in range(TURNS):
            pairs.append([device.measure([program], WORKLOAD)[0] for device in devices])
    for point in pairs[0][0].latencies:
        times = [[each.latencies[point].ms for each in pair] for pair in pairs]
        record.add(point, "ms", [usual for usual, _ in times], "ms")
        record.add(point, "speedup", [usual / huge for usual, huge in times], "ratio")
    peaks = [huge.peak_rss_mib / usual.peak_rss_mib for usual, huge in pairs]
    record.add("process", "peak_rss_ratio", peaks, "ratio")
    record.close()


if __name__ == "__main__":
    main()
