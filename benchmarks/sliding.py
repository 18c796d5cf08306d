"""Latency of one attention half in each lowered form, at the shape of Flash-650M.

The paper found sliding windows inferior to skipped layers, on a runtime whose ring buffer computes
a whole matrix of scores. Cases are `<form>/<latency>`. The metric `block_ms` is the latency of one
attention half: full, as the stock ring buffer, or as the ring that computes little more than the
window. A skipped layer costs nothing, and `ffn` is the half that every layer keeps. `share_of_full`
compares programs that alternated in the same processes.
"""

import dataclasses
import tempfile
from pathlib import Path

from record import SMOKE, Recorder

import conf
from flash.arch import ArchSpec, Attention
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.lowering.blocks import Block, BlockKind, lower_block
from flash.lowering.settings import LoweringSettings, SlidingForm
from flash.records import atomic_write

SPEC = ArchSpec(
    model_dim=1280,
    ffn_dim=6144,
    layer_types=(Attention.full_attention,),
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=202048,
)
DEVICE = DeviceSettings(
    name="host",
    processes=5,
    warmups=1,
    runs=2,
    lowering=LoweringSettings(max_context=2048),
    workload=Workload(prompts=[2048, 512], contexts=[1536, 512]),
)
FLUSH_MIB = 64
if SMOKE:
    SPEC, DEVICE = conf.small_spec(SPEC), conf.small_device(DEVICE)
FORMS = {
    "full": (BlockKind.full_attention, SlidingForm.stock),
    "sliding_stock": (BlockKind.sliding_attention, SlidingForm.stock),
    "sliding_ring": (BlockKind.sliding_attention, SlidingForm.ring),
    "ffn": (BlockKind.ffn, SlidingForm.stock),
}


def main() -> None:
    record = Recorder("sliding")
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for name, (kind, form) in FORMS.items():
            lowering: LoweringSettings = dataclasses.replace(DEVICE.lowering, sliding=form)
            path = Path(folder, f"{name}.pte")
            with atomic_write(path) as file:
                file.write(lower_block(Block.of(kind, SPEC), lowering))
            programs.append(
                Program(name=name, path=path, model_dim=SPEC.model_dim, flush_mib=FLUSH_MIB)
            )
        measured = HostDevice(DEVICE).measure(programs, DEVICE.workload)
    full = measured[0]
    for each in measured:
        for point, latency in each.latencies.items():
            record.add(f"{each.name}/{point}", "block_ms", [latency.ms], "ms")
            share = latency.ms / full.latencies[point].ms
            record.add(f"{each.name}/{point}", "share_of_full", [share], "ratio")
    record.close()


if __name__ == "__main__":
    main()
