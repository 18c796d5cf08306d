"""Our programs compared with ExecuTorch's own export of the same shape: prefill and decode.

The models are flash_350m, flash_650m and the shape of SmolLM2-135M with random weights, in 8da4w
with groups of 32 and a 4-bit embedding. Ours have a cache in fp32 or bf16, the stock program one in
fp32 (the faster of its two caches on x86). A prompt is processed in the chunks that suit each best:
1,024 tokens in the stock program, 256 in ours. Fresh processes of all alternate. `prefill_speedup`
and `decode_speedup` are the stock time divided by ours, pair by pair, at prompts and contexts of
512, 1,024 and 2,048 tokens; `peak_rss_mib` is the peak memory of the measuring process, Python and
torch included.

Programs are kept in runs/serving, so a second run only measures.
`python benchmarks/serving.py [--threads N] [MODEL ...]`; without models it keeps the results.
"""

import argparse
from itertools import product
from pathlib import Path

from record import SMOKE, Recorder, made, output

import conf
from flash.arch import ArchSpec, CacheFormat
from flash.device.host import HostDevice
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder

MODELS = ("flash_350m", "flash_650m", "smollm2_135m")
LENGTHS, DECODE, TURNS = [512, 1024, 2048], 16, 3
if SMOKE:
    MODELS = ("smollm2_135m",)
    LENGTHS, DECODE, TURNS = [16], 4, 1
WAYS = {
    "ours": (AttentionForm.matmul, CacheFormat.fp32),
    "ours_bf16": (AttentionForm.matmul, CacheFormat.bf16),
    "stock": (AttentionForm.sdpa, CacheFormat.fp32),
}
"""Form of attention and cache of each program; the default chunk follows from the former."""
FOLDER = output(Path("runs/serving"))


def spec_of(model: str) -> ArchSpec:
    """Return the shape of a winner of the paper, or of a backbone."""
    found = conf.winner(model) if model.startswith("flash") else conf.shape_of(model)
    return conf.small_spec(found) if SMOKE else found


def device(threads: int, way: str) -> HostDevice:
    attention, cache = WAYS[way]
    context = max(LENGTHS) + 2 * DECODE
    return HostDevice(
        DeviceSettings(
            name="host",
            threads=threads,
            processes=1,
            warmups=1,
            runs=1,
            run_timeout_s=600.0,
            lowering=LoweringSettings(attention=attention, cache=cache, max_context=context),
            workload=Workload(prompts=LENGTHS, contexts=LENGTHS, decode_tokens=DECODE),
        )
    )


def lower_one(way: str, model: str, path: Path) -> None:
    """Write one program; must run in its own process, whose end frees the memory."""
    spec, settings = spec_of(model), device(1, way).settings.lowering
    if way == "stock":
        lower_stock(to_stock_model(spec), settings, path)
    else:
        write(path, lower(Decoder(spec), settings))


def program(way: str, model: str) -> Program:
    path = made(FOLDER / f"{model}-{way}.pte", __file__, "--lower", way, model)
    return Program(name=way, path=path, vocab_size=spec_of(model).vocab_size)


def least(measured: Measurement, point: str) -> float:
    """Return the milliseconds of the fastest run, or of the fastest step of all runs."""
    [samples] = measured.samples
    steps = [step for run in samples[point] for step in run.get("steps_ms", ())]
    return min(steps) if steps else 1e3 * min(run["wall_s"] for run in samples[point])


def compare(record: Recorder, model: str, threads: int) -> None:
    hosts = {way: device(threads, way) for way in WAYS}
    programs = {way: program(way, model) for way in WAYS}
    found: dict[str, list[Measurement]] = {way: [] for way in WAYS}
    for _ in range(TURNS):
        for way, host in hosts.items():
            found[way] += host.measure([programs[way]], host.settings.workload)
    for phase, length in product(("prefill", "decode"), LENGTHS):
        times = {
            way: [least(each, f"{phase}_{length}") for each in measured]
            for way, measured in found.items()
        }
        for way, all_ms in times.items():
            case = f"{model}/{way}/{length}"
            record.add(case, f"{phase}_ms", all_ms, "ms")
            if way != "stock":
                speedups = [b / a for a, b in zip(all_ms, times["stock"], strict=True)]
                record.add(case, f"{phase}_speedup", speedups, "ratio")
    record.add(model, "threads", [threads], "")
    for way in WAYS:
        size = programs[way].path.stat().st_size / 2**20
        record.add(f"{model}/{way}", "program_mib", [size], "MiB")
        peaks = [each.peak_rss_mib for each in found[way]]
        record.add(f"{model}/{way}", "peak_rss_mib", peaks, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lower", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("models", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.lower:
        way, model, path = arguments.lower
        lower_one(way, model, Path(path))
        return
    record = Recorder("serving")
    for model in arguments.models or MODELS:
        compare(record, model, arguments.threads)
    if not arguments.models:
        record.close()


if __name__ == "__main__":
    main()
