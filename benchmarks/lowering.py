"""Lowering compared with the stock path: seconds per layer, and flash_650m from start to file.

- `lower_s_per_layer`: our path and the stock passes on the same model, alternated in one process
  after a warm-up. Lowering takes a fixed time and a time per layer; the latter is the difference
  between a deep and a shallow model divided by the difference of depths.
- `flash_650m`, `smollm2_135m`: one fresh process for each path with random weights in bf16, timed
  from its start to its end with the program in a file. The stock path is the unmodified
  `export_llm` of ExecuTorch on the same shape: 8da4w in groups of 32, 4-bit embedding, fp32 cache,
  context 2048. It takes about 15 minutes and 4 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import SMOKE, Recorder

import conf
from flash.arch import ArchSpec, parse_pattern
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder

SHALLOW = 2
DEEP, ROUNDS = (3, 1) if SMOKE else (6, 3)
CONTEXT = 2048


def _spec(layers: int) -> ArchSpec:
    return ArchSpec(
        model_dim=256,
        ffn_dim=576,
        layer_types=parse_pattern("F" * layers),
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=2048,
    )


def _seconds(layers: int, fast: bool) -> float:
    torch.manual_seed(0)
    model = Decoder(_spec(layers))
    start = time.perf_counter()
    lower(model, LoweringSettings(max_context=1024), fast=fast)
    return time.perf_counter() - start


def per_layer(record: Recorder, rounds: int, deep: int) -> None:
    """Measure the seconds per layer of our path and of the stock passes."""
    _seconds(1, fast=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for fast in seconds:
            first, second = _seconds(SHALLOW, fast), _seconds(deep, fast)
            seconds[fast].append((second - first) / (deep - SHALLOW))
    record.add("8da4w/fast", "lower_s_per_layer", seconds[True], "s")
    record.add("8da4w/stock_passes", "lower_s_per_layer", seconds[False], "s")
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    record.add("8da4w", "time_ratio_vs_stock_passes", ratios, "ratio")


def _in_bf16(arch: ArchSpec) -> Decoder:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Decoder(arch)
    finally:
        torch.set_default_dtype(torch.float32)


def _write_program(way: str, spec: Path, path: Path) -> None:
    """Write a program by one of the two paths; must run in its own process."""
    arch = ArchSpec.from_dict(json.loads(spec.read_text("utf-8")))
    settings = LoweringSettings(max_context=CONTEXT)
    if way == "ours":
        write(path, lower(_in_bf16(arch), settings))  # no reference keeps the float weights
    else:
        lower_stock(to_stock_model(arch), settings, path, fast=False)


def _watch(command: list[str]) -> tuple[float, float]:
    """Measure seconds and peak resident memory [MiB] of a process and its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)} ended with code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**10


def whole_model(record: Recorder, case: str, spec: ArchSpec) -> None:
    """Measure time and peak memory of one model with both paths."""
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = folder / "spec.json"
        described.write_text(json.dumps(spec.to_dict()), "utf-8")
        for way in ("ours", "stock"):
            path = folder / f"{way}.pte"
            found[way] = _watch([sys.executable, __file__, way, str(described), str(path)])
            record.add(f"{case}/{way}", "start_to_file_s", [found[way][0]], "s")
            record.add(f"{case}/{way}", "peak_mib", [found[way][1]], "MiB")
            record.add(f"{case}/{way}", "program_mib", [path.stat().st_size / 2**20], "MiB")
    for number, metric in enumerate(("time_ratio_vs_stock", "peak_ratio_vs_stock")):
        record.add(case, metric, [found["ours"][number] / found["stock"][number]], "ratio")


def main() -> None:
    """Run all cases."""
    record = Recorder("lowering")
    models = {
        "smollm2_135m": conf.shape_of("smollm2_135m"),
        "flash_650m": conf.winner("flash_650m"),
    }
    for case, spec in ({"smoke": _spec(1)} if SMOKE else models).items():
        whole_model(record, case, spec)
    per_layer(record, ROUNDS, DEEP)
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["stock"]):
        _write_program(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
