"""Speed of a program relative to the limits of the machine and to llama.cpp on the same shape.

The shape is flash_350m without QK-norm (for the sake of llama.cpp) with random weights. Our program
is in 8da4w with a 4-bit embedding, that of llama.cpp in q4_0, both in groups of 32 and with the
same number of threads. Caches are in fp32 in both, or in bf16 in ours and in fp16 in llama.cpp,
which has flash attention or not: the faster of the two counts at each point. Fresh processes of all
six take turns.

- `prefill_int8_share`: operations per second of the linear layers, relative to the fastest int8
  matrix product of torch (a 1024-cube with each engine, such as FBGEMM and oneDNN). `torch._int_mm`
  is no limit: without VNNI it ran at 1 GOP/s where FBGEMM reached 150.
- `decode_bandwidth_share`: bytes of weights and cache read per second, relative to the rate at
  which a buffer of 256 MiB is summed.
- `prefill_ratio_vs_llama_cpp`, `decode_ratio_vs_llama_cpp`: time of llama.cpp divided by ours.

llama-cpp-python is optional (`pip install llama-cpp-python`, a build of about 15 minutes); without
it only the shares are measured, with a message. Files are kept in runs/limits.
`python benchmarks/limits.py [--threads N]`
"""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from llama_timing import FP16, FP32, LlamaTiming, is_installed
from record import SMOKE, Recorder, in_fresh_process, made, output

import conf
from flash.arch import ArchSpec, CacheFormat, count_parameters, kv_cache_bytes
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.interop.gguf import write_gguf
from flash.interop.settings import GgufFormat
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder

PROMPT, CONTEXTS, STEPS, PROCESSES = 512, (128, 2048), 16, 3
SETTINGS = LoweringSettings(max_context=2080)
if SMOKE:
    PROMPT, CONTEXTS, STEPS, PROCESSES = 32, (16, 32), 2, 1
    SETTINGS = LoweringSettings(max_context=64)
CACHES = {CacheFormat.fp32: FP32, CacheFormat.bf16: FP16}
"""Cache of our program, and type of llama.cpp's: float32 or float16."""
FOLDER = output(Path("runs/limits"))


def spec() -> ArchSpec:
    """Return the shape of flash_350m without QK-norm."""
    found = conf.winner("flash_350m").replace(qk_norm=False)
    return conf.small_spec(found) if SMOKE else found


def file(name: str) -> Path:
    """Return our program, named by its cache, or llama.cpp's file; made in its own process."""
    return made(FOLDER / name, __file__, "--make")


def make(path: Path) -> None:
    """Write our program or the GGUF file, as the suffix of `path` says."""
    torch.manual_seed(0)
    model = Decoder(spec())
    if path.suffix == ".pte":
        cache = CacheFormat(path.stem)
        write(path, lower(model, dataclasses.replace(SETTINGS, cache=cache)))
        return
    write_gguf(path, model, tokenizer=None, weight_format=GgufFormat.q4_0)


def fastest(run: Callable[[], object], rounds: int = 5) -> float:
    """Measure the seconds of the fastest of several calls, after a warm-up call."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(threads: int) -> dict[str, float]:
    """Measure the limits of the machine: bytes and int8 operations per second."""
    torch.set_num_threads(threads)
    buffer = torch.ones(64 * 2**20)
    return {"bytes_per_s": 4 * buffer.numel() / fastest(buffer.sum), "int8_per_s": int8_per_s()}


def int8_per_s(size: int = 1024) -> float:
    """Measure the operations per second of the fastest int8 matrix product."""
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
    weight = torch.quantize_per_tensor(torch.randn(size, size), 0.02, 0, torch.qint8)
    x = torch.quantize_per_tensor(torch.randn(size, size), 0.02, 128, torch.quint8)
    seconds = []
    for engine in torch.backends.quantized.supported_engines:
        if engine != "none":
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.linear_prepack(weight, None)
            seconds.append(fastest(lambda p=packed: torch.ops.quantized.linear(x, p, 0.1, 128)))
    return 2 * size**3 / min(seconds)


def ours(path: Path, threads: int) -> dict[str, float]:
    """Measure the seconds of a prompt and of a decode step at each context."""
    settings = DeviceSettings(
        name="host",
        threads=threads,
        processes=1,
        warmups=1,
        runs=2,
        run_timeout_s=600.0,
        lowering=LoweringSettings(max_context=SETTINGS.max_context, prefill_chunk=SETTINGS.chunk),
        workload=Workload(prompts=[PROMPT], contexts=list(CONTEXTS), decode_tokens=STEPS),
    )
    program = Program(name="ours", path=path, vocab_size=spec().vocab_size)
    [measured] = HostDevice(settings).measure([program], settings.workload)
    return {name: latency.ms / 1e3 for name, latency in measured.latencies.items()}


def theirs(threads: int, cache: CacheFormat) -> dict[str, float]:
    """Measure the same with llama.cpp."""
    timing = LlamaTiming(
        path=str(file("theirs.gguf")),
        vocab_size=spec().vocab_size,
        prompts=[PROMPT],
        contexts=list(CONTEXTS),
        steps=STEPS,
        max_context=SETTINGS.max_context,
        threads=threads,
        cache=CACHES[cache],
    )
    return timing.best()


def report(
    record: Recorder, case: str, own: list[dict[str, float]], other: list[dict[str, float]]
) -> None:
    """Report our milliseconds, those of llama.cpp and their ratios; `other` may be empty."""
    for point in own[0]:
        record.add(f"ours/{case}/{point}", "ms", [1e3 * run[point] for run in own], "ms")
        if other:
            record.add(f"llama.cpp/{case}/{point}", "ms", [1e3 * run[point] for run in other], "ms")
            ratios = [b[point] / a[point] for a, b in zip(own, other, strict=True)]
            phase = point.split("_")[0]
            record.add(f"flash_350m/{case}/{point}", f"{phase}_ratio_vs_llama_cpp", ratios, "ratio")


def main(threads: int) -> None:
    programs = {cache: file(f"{cache.value}.pte") for cache in CACHES}
    record = Recorder("limits")
    has_llama = is_installed()
    limits: list[dict[str, float]] = []
    own: dict[CacheFormat, list[dict[str, float]]] = {cache: [] for cache in CACHES}
    other: dict[CacheFormat, list[dict[str, float]]] = {cache: [] for cache in CACHES}
    for _ in range(PROCESSES):
        limits.append(in_fresh_process(__file__, "--machine", str(threads)))
        for cache, program in programs.items():
            own[cache].append(ours(program, threads))
            if has_llama:
                other[cache].append(theirs(threads, cache))
    shape = spec()
    count = count_parameters(shape)
    linear = 2 * PROMPT * (count.attention + count.ffn)
    # A decode step reads the whole output head, but only one row of the embedding.
    embedding = shape.vocab_size * shape.model_dim * (1 / 2 + 5 / 32)
    for cache, runs in own.items():
        pairs = list(zip(runs, limits, strict=True))
        case = f"flash_350m/{cache.value}"
        shares = [linear / run[f"prefill_{PROMPT}"] / limit["int8_per_s"] for run, limit in pairs]
        record.add(f"{case}/{PROMPT}", "prefill_int8_share", shares, "ratio")
        for context in CONTEXTS:
            window = min(context, shape.sliding_window)
            kept = kv_cache_bytes(shape, context, window, cache)
            moved = SETTINGS.weight_bytes(shape) - embedding + kept
            shares = [
                moved / run[f"decode_{context}"] / limit["bytes_per_s"] for run, limit in pairs
            ]
            record.add(f"{case}/{context}", "decode_bandwidth_share", shares, "ratio")
        report(record, cache.value, runs, other[cache])
    for name, unit in (("bytes_per_s", "bytes/s"), ("int8_per_s", "operations/s")):
        record.add("limits", name, [limit[name] for limit in limits], unit)
    record.add("limits", "threads", [threads], "")
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--machine"]:
        Path(sys.argv[3]).write_text(json.dumps(machine(int(sys.argv[2]))), "utf-8")
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("--threads", type=int, default=1)
        main(parser.parse_args().threads)
