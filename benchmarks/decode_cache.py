"""Decode step and prefill with each float format of the KV cache, and of ExecuTorch's own export.

The model has four layers of flash_350m's widths, three of them with attention, and a small
vocabulary, so that attention is a visible share of a decode step. Weights are random, in 8da4w with
groups of 32. `fp32` and `bf16` are our programs in calls of 256 tokens; `stock` is ExecuTorch's
`export_llm` of the same shape, fp32 cache, in calls of 1,024: each its best.

Cases are `<program>/<point>`. All programs are loaded in one process of one thread and take turns
at each prompt and at each decode step. `ms` is time of the processor, which other work on the
machine disturbs less than the clock. `speedup_vs_fp32` and `speedup_vs_stock` are the other
program's time divided by this one's, turn by turn.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import SMOKE, Recorder, alternate

import conf
from flash.arch import ArchSpec, CacheFormat, parse_pattern
from flash.device.runner import prepare
from flash.device.workload import Phase, Point, Workload
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.lowering.gate import Step, load_runtime_step
from flash.lowering.lower import lower
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder

PATTERN, VOCABULARY = "FF-F", 16_384
WORKLOAD = Workload(prompts=[512, 2048], contexts=[128, 1024, 2048])
TURNS = {Phase.prefill: 9, Phase.decode: 60}
if SMOKE:
    WORKLOAD = Workload(prompts=[16, 32], contexts=[8, 32])
    TURNS = dict.fromkeys(Phase, 2)
FORMS = {
    "fp32": (CacheFormat.fp32, AttentionForm.matmul),
    "bf16": (CacheFormat.bf16, AttentionForm.matmul),
    "stock": (CacheFormat.fp32, AttentionForm.sdpa),
}
"""Cache of each program, and its form of attention; the default chunk follows from the latter."""
PAIRS = (("bf16", "fp32"), ("fp32", "stock"), ("bf16", "stock"))
"""Programs whose times are compared."""


def settings(name: str) -> LoweringSettings:
    cache, attention = FORMS[name]
    context = max(*WORKLOAD.prompts, *WORKLOAD.contexts) + 32
    return LoweringSettings(cache=cache, attention=attention, max_context=context)


def load(name: str, spec: ArchSpec, lowering: LoweringSettings) -> Step:
    if name != "stock":
        return load_runtime_step(lower(Decoder(spec), lowering))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stock.pte")
        lower_stock(to_stock_model(spec), lowering, path)
        return load_runtime_step(path.read_bytes())


def milliseconds(step: Step, chunk: int, vocabulary: int, point: Point) -> float:
    """Time a prompt, or the step at a position of the cache, whose content does not matter."""
    first = point.tokens if point.phase is Phase.decode else 0
    end = first + 1 if point.phase is Phase.decode else point.tokens
    text = torch.randint(0, vocabulary, (1, end))
    begin = time.process_time()
    for start in range(first, end, chunk):
        step(text[:, start : min(start + chunk, end)], torch.tensor([start]))
    return 1e3 * (time.process_time() - begin)


def compare(record: Recorder, spec: ArchSpec) -> None:
    prepare(threads=1)
    formats = {name: settings(name) for name in FORMS}
    steps = {name: load(name, spec, formats[name]) for name in FORMS}
    for name, lowering in formats.items():
        record.add(name, "cache_mib", [lowering.cache_bytes(spec) / 2**20], "MiB")
    for point in WORKLOAD.points:
        runs: dict[str, Callable[[], float]] = {
            name: partial(milliseconds, step, formats[name].chunk, spec.vocab_size, point)
            for name, step in steps.items()
        }
        alternate(runs, rounds=1)
        found = alternate(runs, TURNS[point.phase])
        for name, times in found.items():
            record.add(f"{name}/{point}", "ms", times, "ms")
        for name, other in PAIRS:
            pairs = zip(found[other], found[name], strict=True)
            speedups = [theirs / ours for theirs, ours in pairs]
            record.add(f"{name}/{point}", f"speedup_vs_{other}", speedups, "ratio")


def main() -> None:
    record, spec = Recorder("decode_cache"), conf.winner("flash_350m")
    spec = spec.replace(layer_types=parse_pattern(PATTERN), vocab_size=VOCABULARY)
    compare(record, conf.small_spec(spec) if SMOKE else spec)
    record.close()


if __name__ == "__main__":
    main()
