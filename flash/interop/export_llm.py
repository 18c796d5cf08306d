"""Lowering with ExecuTorch's own `export_llm`, with random weights, to measure its latency.

The export runs in a process of its own (export_llm_child.py): it changes classes of ExecuTorch, is
configured through the command line, and may run out of memory.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flash.arch import CacheFormat, Quantization
from flash.errors import CheckFailed, require
from flash.interop.baselines import StockModel
from flash.log_filters import is_noise
from flash.lowering.settings import LoweringSettings, SlidingForm

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("export_llm_child.py")
"""Script of the process that exports."""


def lower_stock(
    model: StockModel,
    lowering: LoweringSettings,
    path: Path,
    *,
    seed: int = 0,
    fast: bool = True,
) -> None:
    """Write the .pte that `python -m executorch.extension.llm.export.export_llm` makes of `model`.

    Its method is that of `lower`: `forward(tokens [1, s], input_pos [1]) -> logits [1, vocab]`.
    The child process ends with this one, and `path` appears completely or not at all. A temporary
    checkpoint beside it takes 2 bytes a parameter.

    Args:
        model: Shape of the model.
        lowering: Formats and lengths; weights, embedding and cache get the formats of `lower`.
        path: File to write.
        seed: Seed of the random weights.
        fast: Whether to leave out repeated work of the passes; False leaves ExecuTorch untouched.

    Raises:
        InputError: ExecuTorch's exporter cannot write this combination.
        CheckFailed: The export failed; the message ends with the last lines that it printed.
    """
    check_stock(model, lowering)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = Path(name)
        (folder / "params.json").write_text(json.dumps(dict(model.params)), "utf-8")
        job = {
            "params": "params.json",
            "checkpoint": "random.pt",
            "seed": seed,
            "fast": fast,
            "arguments": _arguments(model, lowering),
        }
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        _run_child(model.name, folder)
        program = folder / "model.pte"
        with program.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(program, path)
    log.debug("%s: export_llm took %.0f s", model.name, time.perf_counter() - started)


def check_stock(model: StockModel, lowering: LoweringSettings) -> None:
    """Check that ExecuTorch's exporter can lower `model`; this takes no noticeable time.

    Raises:
        InputError: The cache is in bfloat16, the group size does not divide the model's widths, the
            sliding layers are not in the stock form, or a prefill chunk is longer than the ring
            buffers.
    """
    require(
        lowering.cache is not CacheFormat.bf16,
        "device.lowering.cache",
        lowering.cache.value,
        f"fp32 or int8 for {model.name}, which ExecuTorch's own stack lowers",
    )
    require(
        lowering.quantization is Quantization.fp32
        or all(width % lowering.group_size == 0 for width in model.widths),
        "device.lowering.group_size",
        lowering.group_size,
        f"a divisor of the widths {model.widths} of {model.name}",
    )
    windows = [window for window in model.windows if window]
    if not windows:
        return
    require(
        lowering.sliding is SlidingForm.stock,
        "device.lowering.sliding",
        lowering.sliding.value,
        f"stock for {model.name}, which ExecuTorch's own stack lowers",
    )
    require(
        lowering.chunk <= 2 * min(windows),
        "device.lowering.prefill_chunk",
        lowering.chunk,
        f"at most {2 * min(windows)} for {model.name}, whose ring buffers hold twice their window",
    )


def _arguments(model: StockModel, lowering: LoweringSettings) -> list[str]:
    """Overrides of export_llm's configuration; files are relative to its working folder.

    `export.max_seq_length` must be one more than the longest call of the program.
    """
    values: dict[str, Any] = {
        "base.model_class": model.model_class,
        "base.params": "params.json",
        "base.checkpoint": "random.pt",
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "model.enable_dynamic_shape": True,
        "model.quantize_kv_cache": lowering.cache is CacheFormat.int8,
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,  # as in the stack's own recipes
        "export.max_seq_length": lowering.chunk + 1,
        "export.max_context_length": max(lowering.max_context, lowering.chunk + 1),
        "export.output_name": "model.pte",
        "hydra/job_logging": "stdout",
        "hydra.job.chdir": False,
        "hydra.run.dir": ".",
        "hydra.output_subdir": "null",
    }
    if lowering.quantization is Quantization.int8da4w:
        values["quantization.qmode"] = "8da4w"
        values["quantization.group_size"] = lowering.group_size
        group = lowering.group_size if lowering.embedding_bits == 4 else 0  # 0: a row is a group
        values["quantization.embedding_quantize"] = f"'{lowering.embedding_bits},{group}'"
        values["quantization.use_hqq"] = False  # a search for better scales: minutes, for nothing
    if model.windows:
        values["model.local_global_attention"] = f"[{','.join(map(str, model.windows))}]"
    return [f"{key}={value}" for key, value in values.items()]


def _run_child(model_name: str, folder: Path) -> None:
    """Run export_llm_child.py on the job in `folder`, where it writes model.pte.

    Raises:
        CheckFailed: It failed or wrote no program.
    """
    output = folder / "output.txt"
    # -P: the folder of the script, with modules of our own, is not searched for imports.
    command = [sys.executable, "-P", str(CHILD), "job.json"]
    with (
        output.open("wb") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HYDRA_FULL_ERROR": "1"},  # the error itself comes last
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as child,
    ):
        try:
            child.wait()
        except BaseException:  # Ctrl-C included: leave no process behind
            child.kill()
            child.wait()
            raise
    if child.returncode == 0 and (folder / "model.pte").is_file():
        return
    text = output.read_text("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not is_noise(line)]
    reason = " | ".join(lines[-3:]) or "it printed nothing"
    if child.returncode < 0:
        reason = f"signal {-child.returncode}, most likely because memory was full; {reason}"
    raise CheckFailed(
        f"{model_name}: ExecuTorch's export_llm ended with code {child.returncode} and no program: "
        f"{reason}"
    )
