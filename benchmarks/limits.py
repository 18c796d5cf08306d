"""Speed of a program relative to the limits of the machine and to llama.cpp on the same shape.

The shape is flash_350m without QK-norm (for the sake of llama.cpp) with random weights. Our program
is in 8da4w with a 4-bit embedding and a float cache, that of llama.cpp in q4_0, both in groups of
32 and with the same number of threads. Each of several fresh processes times one, then the other.

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
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from record import Recorder, in_fresh_process

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
FOLDER = Path("runs/limits")


def spec() -> ArchSpec:
    """Return the shape of flash_350m without QK-norm."""
    return conf.winner("flash_350m").replace(qk_norm=False)


def files() -> tuple[Path, Path]:
    """Return our program and that of llama.cpp; each is made in its own process if missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = FOLDER / "ours.pte", FOLDER / "theirs.gguf"
    for path in paths:
        if not path.is_file():
            subprocess.run([sys.executable, __file__, "--make", str(path)], check=True)
    return paths


def make(path: Path) -> None:
    """Write our program or the GGUF file, as the suffix of `path` says."""
    torch.manual_seed(0)
    model = Decoder(spec())
    if path.suffix == ".pte":
        write(path, lower(model, SETTINGS))
        return
    form = GgufFormat.q4_0
    write_gguf(path, model, tokenizer=None, weight_format=form)


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


def theirs(path: Path, threads: int) -> dict[str, float]:
    """Measure the same with llama.cpp; must be called in a fresh process."""
    import llama_cpp

    runtime = llama_cpp.Llama(
        str(path),
        n_ctx=SETTINGS.max_context,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=0,  # float32, as ours
        type_v=0,
        verbose=False,
    )
    tokens = torch.randint(0, spec().vocab_size, (max(CONTEXTS),)).tolist()

    def prompt() -> None:
        runtime.reset()
        runtime.eval(tokens[:PROMPT])

    found = {f"prefill_{PROMPT}": fastest(prompt, 2)}
    for context in CONTEXTS:
        runtime.reset()
        runtime.eval(tokens[:context])
        steps = []
        for _ in range(STEPS):
            start = time.perf_counter()
            runtime.eval([1])
            steps.append(time.perf_counter() - start)
        found[f"decode_{context}"] = min(steps)
    return found


def main(threads: int) -> None:
    program, gguf = files()
    record = Recorder("limits")
    has_llama = importlib.util.find_spec("llama_cpp") is not None
    if not has_llama:
        print("llama-cpp-python is not installed: only the shares are measured", file=sys.stderr)
    runs: dict[str, list[dict[str, float]]] = {"machine": [], "ours": [], "theirs": []}
    for _ in range(PROCESSES):
        runs["machine"].append(in_fresh_process(__file__, "--machine", str(threads)))
        runs["ours"].append(ours(program, threads))
        if has_llama:
            runs["theirs"].append(in_fresh_process(__file__, "--theirs", str(gguf), str(threads)))
    shape = spec()
    count = count_parameters(shape)
    linear = 2 * PROMPT * (count.attention + count.ffn)
    pairs = list(zip(runs["ours"], runs["machine"], strict=True))
    shares = [linear / own[f"prefill_{PROMPT}"] / limit["int8_per_s"] for own, limit in pairs]
    record.add(f"flash_350m/{PROMPT}", "prefill_int8_share", shares, "ratio")
    # A decode step reads the whole output head, but only one row of the embedding.
    embedding = shape.vocab_size * shape.model_dim * (1 / 2 + 5 / 32)
    for context in CONTEXTS:
        moved = (
            SETTINGS.weight_bytes(shape)
            - embedding
            + kv_cache_bytes(shape, context, min(context, shape.sliding_window), CacheFormat.fp32)
        )
        shares = [moved / own[f"decode_{context}"] / limit["bytes_per_s"] for own, limit in pairs]
        record.add(f"flash_350m/{context}", "decode_bandwidth_share", shares, "ratio")
    for point in runs["ours"][0]:
        record.add(f"ours/{point}", "ms", [1e3 * own[point] for own in runs["ours"]], "ms")
        if has_llama:
            both = list(zip(runs["ours"], runs["theirs"], strict=True))
            record.add(f"llama.cpp/{point}", "ms", [1e3 * b[point] for _, b in both], "ms")
            phase = point.split("_")[0]
            ratios = [b[point] / a[point] for a, b in both]
            record.add(f"flash_350m/{point}", f"{phase}_ratio_vs_llama_cpp", ratios, "ratio")
    for name, unit in (("bytes_per_s", "bytes/s"), ("int8_per_s", "operations/s")):
        record.add("limits", name, [limit[name] for limit in runs["machine"]], unit)
    record.add("limits", "threads", [threads], "")
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--machine"]:
        Path(sys.argv[3]).write_text(json.dumps(machine(int(sys.argv[2]))), "utf-8")
    elif sys.argv[1:2] == ["--theirs"]:
        os.environ["OMP_NUM_THREADS"] = sys.argv[3]
        Path(sys.argv[4]).write_text(json.dumps(theirs(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
        parser.add_argument("--threads", type=int, default=1)
        main(parser.parse_args().threads)
