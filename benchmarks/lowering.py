"""Lowering against the stock path: seconds a layer, and flash_650m from start to file.

`lower_s_per_layer`: our path, and the stock passes on the same model, alternated in one process
after a warm-up. Lowering a whole model costs a fixed part and a part a layer; the latter is the
difference of a deep and a shallow model over the difference of depths.

`flash_650m`: one fresh process each with random weights, timed from its start to its end, the
program being in a file; the stock path is ExecuTorch's `export_llm` on the same widths and layers,
8da4w in groups of 32, 4-bit embedding, fp32 cache, context 2048. Takes about 10 minutes and 10 GB.

`python benchmarks/lowering.py smoke` does all of it at a small size and keeps nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import Recorder

import conf
from flash.arch import ArchSpec, parse_pattern
from flash.lowering import LoweringSettings, lower, write
from flash.model import Decoder

ROUNDS = 3
SHALLOW, DEEP = 2, 6
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
    """Seconds a layer, our path and the stock passes."""
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


def _write_program(spec: Path, path: Path) -> None:
    """Our path, in a process of its own."""
    arch = ArchSpec.from_dict(json.loads(spec.read_text("utf-8")))
    write(path, lower(Decoder(arch), LoweringSettings(max_context=CONTEXT)))


def _stock_command(spec: ArchSpec, folder: Path) -> list[str]:
    params = {
        "dim": spec.model_dim,
        "hidden_dim": spec.ffn_dim,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "use_qk_norm": spec.qk_norm,
        "layer_types": [kind.value for kind in spec.layer_types],
    }
    path = folder / "params.json"
    path.write_text(json.dumps(params), "utf-8")
    return [
        *(sys.executable, "-m", "executorch.extension.llm.export.export_llm"),
        *("base.model_class=llama3", f"base.params={path}"),
        *("model.use_kv_cache=True", "model.use_sdpa_with_kv_cache=True"),
        *("model.enable_dynamic_shape=True", "backend.xnnpack.enabled=True"),
        *("quantization.qmode=8da4w", "quantization.group_size=32"),
        "quantization.embedding_quantize='4,32'",
        *(f"export.max_seq_length={CONTEXT}", f"export.max_context_length={CONTEXT}"),
        f"export.output_name={folder / 'stock.pte'}",
    ]


def _watch(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak resident memory [MiB] of one process; its output goes to a file."""
    log = folder / "output.log"
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    peak = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines()
        for line in status:  # a process that just ended has no such line
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) / 2**10
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"error: {command[1:4]} failed:\n{log.read_text('utf-8', 'replace')[-2000:]}")
    return seconds, peak


def whole_model(record: Recorder, case: str, spec: ArchSpec) -> None:
    """Time and peak memory of one model, both paths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = folder / "spec.json"
        described.write_text(json.dumps(spec.to_dict()), "utf-8")
        script = os.fspath(Path(__file__).resolve())
        ours = [sys.executable, script, "lower", str(described), str(folder / "ours.pte")]
        seconds, peak = _watch(ours, folder)
        stock_seconds, stock_peak = _watch(_stock_command(spec, folder), folder)
        sizes = {path.stem: path.stat().st_size / 2**20 for path in folder.glob("*.pte")}
    for path, values in (("ours", (seconds, peak)), ("stock", (stock_seconds, stock_peak))):
        record.add(f"{case}/{path}", "start_to_file_s", [values[0]], "s")
        record.add(f"{case}/{path}", "peak_mib", [values[1]], "MiB")
        record.add(f"{case}/{path}", "program_mib", [sizes[path]], "MiB")
    record.add(case, "time_ratio_vs_stock", [seconds / stock_seconds], "ratio")
    record.add(case, "peak_ratio_vs_stock", [peak / stock_peak], "ratio")


def main() -> None:
    """Run all cases; `smoke` at a small size."""
    record = Recorder("lowering")
    if sys.argv[1:] == ["smoke"]:
        whole_model(record, "smoke", _spec(1))
        per_layer(record, rounds=1, deep=SHALLOW + 1)
        return
    whole_model(record, "flash_650m", conf.winner("flash_650m"))
    per_layer(record, ROUNDS, DEEP)
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["lower"]:
        _write_program(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
