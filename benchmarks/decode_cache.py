"""Decode step and prefill with each float format of the KV cache, and of ExecuTorch's own export.

The model has four layers of flash_350m's widths, three of them with attention, and a small
vocabulary, so that attention is a visible share of a decode step. Weights are random, in 8da4w with
groups of 32. Cases are `<program>/<point>`. `ms` is the smallest time of a fresh process; the
processes of all programs alternate. `speedup_vs_fp32` and `speedup_vs_stock` are the other
program's time divided by this one's, turn by turn. `fp32` and `bf16` are our programs in calls of
256 tokens, `stock` is ExecuTorch's `export_llm` of the same shape (fp32 cache) in calls of 1,024,
each its best.

`python benchmarks/decode_cache.py smoke` runs everything at a small size and keeps no results.
"""

import sys
import tempfile
from pathlib import Path

from record import Recorder

import conf
from flash.arch import ArchSpec, CacheFormat, parse_pattern
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder

PATTERN, VOCABULARY = "FF-F", 16_384
WORKLOAD = Workload(prompts=[512, 2048], contexts=[128, 1024, 2048], decode_tokens=32)
SMOKE = Workload(prompts=[16, 32], contexts=[8, 32], decode_tokens=4)
TURNS = 7
WAYS = {
    "fp32": (CacheFormat.fp32, AttentionForm.matmul),
    "bf16": (CacheFormat.bf16, AttentionForm.matmul),
    "stock": (CacheFormat.fp32, AttentionForm.sdpa),
}
"""Cache of each program, and its form of attention; the default chunk follows from the latter."""
PAIRS = (("bf16", "fp32"), ("fp32", "stock"), ("bf16", "stock"))
"""Programs whose times are compared."""


def device(way: str, workload: Workload) -> HostDevice:
    cache, attention = WAYS[way]
    context = max(*workload.prompts, *workload.contexts) + workload.decode_tokens
    lowering = LoweringSettings(cache=cache, attention=attention, max_context=context)
    return HostDevice(
        DeviceSettings(
            name="host", processes=1, warmups=1, runs=2, lowering=lowering, workload=workload
        )
    )


def program(way: str, spec: ArchSpec, host: HostDevice, folder: Path) -> Program:
    path = folder / f"{way}.pte"
    if way == "stock":
        lower_stock(to_stock_model(spec), host.settings.lowering, path)
    else:
        write(path, lower(Decoder(spec), host.settings.lowering))
    return Program(name=way, path=path, vocab_size=spec.vocab_size)


def compare(record: Recorder, spec: ArchSpec, workload: Workload, turns: int) -> None:
    hosts = {way: device(way, workload) for way in WAYS}
    found: dict[str, dict[str, list[float]]] = {
        way: {point.name: [] for point in workload.points} for way in WAYS
    }
    with tempfile.TemporaryDirectory() as folder:
        programs = {way: program(way, spec, host, Path(folder)) for way, host in hosts.items()}
        for _ in range(turns):
            for way, host in hosts.items():
                [measured] = host.measure([programs[way]], workload)
                for point, latency in measured.latencies.items():
                    found[way][point].append(latency.ms)
    for way, host in hosts.items():
        mib = host.settings.lowering.cache_bytes(spec) / 2**20
        record.add(way, "cache_mib", [mib], "MiB")
        for point, times in found[way].items():
            record.add(f"{way}/{point}", "ms", times, "ms")
    for way, other in PAIRS:
        for point, times in found[way].items():
            pairs = zip(found[other][point], times, strict=True)
            speedups = [theirs / ours for theirs, ours in pairs]
            record.add(f"{way}/{point}", f"speedup_vs_{other}", speedups, "ratio")


def main() -> None:
    """Run all cases; `smoke` at a small size."""
    record = Recorder("decode_cache")
    if sys.argv[1:] == ["smoke"]:
        spec = conf.winner("flash_350m").replace(
            layer_types=parse_pattern("F"), model_dim=128, ffn_dim=128, vocab_size=512
        )
        compare(record, spec, SMOKE, turns=1)
        return
    spec = conf.winner("flash_350m").replace(
        layer_types=parse_pattern(PATTERN), vocab_size=VOCABULARY
    )
    compare(record, spec, WORKLOAD, TURNS)
    record.close()


if __name__ == "__main__":
    main()
