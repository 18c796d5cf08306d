r"""Everything that only a GPU can prove or show, prepared for a few minutes on one H100 or H200.

The machine has PyTorch, Lightning and transformers, and no network. What else is needed is fetched
beforehand (1.5 MB) and carried along with a clone; `flash` itself is not installed:

    pip wheel --no-deps -w wheels hydra-core==1.3.8 omegaconf==2.3.0 \\
      antlr4-python3-runtime==4.9.3 liger-kernel==0.8.5
    pip install --no-deps --no-index --target site wheels/*.whl
    PYTHONPATH=.:site python benchmarks/gpu.py --out gpu.jsonl

The parts run in this order, each in a process of its own, and end within `--minutes` in all. A part
that fails or runs out of time leaves the lines that it has printed, and the next one begins.

- `tests`: the tests marked `gpu`; `passed` and `failed` of them. Each that failed is named.
- `step`: a training step of flash_650m on random tokens, 2,048 a sequence, in bf16, with fused
  AdamW and clipping, for cross-entropy (`ce`, 4 sequences) and for distillation from the backbone
  (`kd`, 2 sequences). Ways, in turns: `ours`, `compiled`, `transformers` (Qwen3ForCausalLM with
  SDPA, its skipped attention taken out, its own loss or PyTorch's KL), `liger` (the same with
  Liger's kernels for norms, SwiGLU, rotary embedding and losses; only `ce`; the patch of the rotary
  embedding is global and so serves `transformers` too).
  `mfu` is relative to the rate of a matrix product of 8,192 measured here; `tokens_per_s_ratio` of
  our two is relative to the better of the others, round by round.
- `losses`: the loss alone, forward and backward, of 8,192 positions over 202,048 tokens at width
  1,280 in bf16: `ours` in chunks, `plain` from all logits, `liger`; `ms`, `peak_gib`, and
  `time_ratio` of ours to the fastest of the others.
- `memory`: `peak_gib` of a step at 8,192 tokens, with checkpointing and without, and the estimate
  that training logs, as `estimate_ratio`.
- `fit`: the same model through `flash.training.fit` on the standard library's sources: `mfu` and
  `tokens_per_s` with data loading, Lightning and logging included, compiled; and the rate at which
  batches can be loaded, as `loading_ratio` to that of training.

`--dry-run`, or `smoke`, does all of it on the CPU at a tiny size, to show that the script runs; its
figures mean nothing.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from record import SMOKE, Recorder, alternate
from torch import Tensor, nn

import conf
from flash.arch import ArchSpec, parse_pattern, training_flops_per_token
from flash.model.decoder import Decoder
from flash.model.families import to_config
from flash.model.losses import Operands, linear_losses
from flash.training.callbacks import measure_peak_flops
from flash.training.memory import GIB, step_memory
from flash.training.settings import Precision, RecipeSettings, TrainerSettings

PARTS = {"tests": 150, "step": 210, "losses": 60, "memory": 60, "fit": 120}
"""Longest duration of each part [seconds]."""
CE, KD = "ce", "kd"
BATCH = {CE: 4, KD: 2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run: those of the paper on a GPU, or tiny ones on a CPU."""

    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def model(self) -> ArchSpec:
        spec = conf.winner("flash_650m")
        return _tiny(spec) if self.dry else spec

    @property
    def backbone(self) -> ArchSpec:
        spec = conf.flash_backbone()
        return _tiny(spec) if self.dry else spec

    @property
    def seq_len(self) -> int:
        return 32 if self.dry else 2048

    @property
    def long(self) -> int:
        return 64 if self.dry else 8192

    @property
    def rounds(self) -> int:
        return 2 if self.dry else 7

    @property
    def steps(self) -> int:
        """Steps that are timed together."""
        return 1 if self.dry else 4

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, backend="eager" if self.dry else "inductor")

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], times: int) -> float:
        """Mean duration of `times` calls of `run`, which may only have queued its work."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.wait()
        return (time.perf_counter() - start) / times

    def peak_gib(self, run: Callable[[], object]) -> float:
        """Highest allocated memory during a call of `run` [GiB]; 0 on a CPU."""
        run()
        if self.dry:
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / GIB


def _tiny(spec: ArchSpec) -> ArchSpec:
    return dataclasses.replace(
        spec,
        model_dim=64,
        ffn_dim=96,
        layer_types=parse_pattern("F-F"),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=4096,
    )


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def reported(record: Recorder, case: str) -> Iterator[None]:
    """Report a way that runs out of memory and go on with the others."""
    try:
        yield
    except torch.OutOfMemoryError:
        record.add(case, "out_of_memory", [1.0], "")
    release()


class Skipped(nn.Module):
    """A decoder layer of transformers without its attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


def transformers_model(plan: Plan, *, liger: bool) -> nn.Module:
    """Build flash_650m of transformers' Qwen3, with Liger's kernels if `liger`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    spec = dataclasses.replace(plan.model, layer_types=parse_pattern("F" * plan.model.num_layers))
    config = Qwen3Config(**to_config(spec))
    config._attn_implementation = "sdpa"
    config.use_cache = False
    with plan.device:
        model = Qwen3ForCausalLM(config)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3(model=model)
    for i, kind in enumerate(plan.model.layer_types):
        if not kind.attends:
            model.model.layers[i] = Skipped(model.model.layers[i])
    return model


def ours(plan: Plan, model: Decoder, teacher: Decoder | None, *, compiled: bool) -> Callable:
    decode = plan.compiled(model.hidden) if compiled else model.hidden

    def loss(batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
        hidden = decode(inputs).flatten(0, 1)
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = Operands(teacher.hidden(inputs).flatten(0, 1), teacher.lm_head.weight)
        weight = 0.0 if teacher is None else 0.5
        student = Operands(hidden, model.lm_head.weight)
        return linear_losses(student, targets, teacher=taught, kd_weight=weight).total / len(
            targets
        )

    return loss


def theirs(model: nn.Module, teacher: Decoder | None) -> Callable[[Tensor], Tensor]:
    def loss(batch: Tensor) -> Tensor:
        if teacher is None:
            return model(batch, labels=batch).loss
        inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
        log_p = torch.log_softmax(model(inputs).logits.flatten(0, 1).float(), dim=-1)
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(inputs).flatten(0, 1).float(), dim=-1)
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        return 0.5 * F.nll_loss(log_p, targets) + 0.5 * kl

    return loss


def step(
    plan: Plan, model: nn.Module, loss: Callable[[Tensor], Tensor], batch: Tensor
) -> Callable[[], None]:
    """Make a function that runs a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        with torch.autocast(plan.device.type, torch.bfloat16):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def timed(plan: Plan, runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], float]]:
    """Make functions that return the mean seconds of a few calls in each way."""
    return {way: partial(plan.seconds, run, plan.steps) for way, run in runs.items()}


def random_tokens(plan: Plan, batch: int, length: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(plan.model.vocab_size, (batch, length + 1), device=plan.device)


def steps_of(plan: Plan, kind: str, record: Recorder) -> dict[str, Callable[[], None]]:
    """Make the steps of all ways that this machine can run."""
    with plan.device:
        teacher = Decoder(plan.backbone).bfloat16().requires_grad_(False) if kind == KD else None
        model = Decoder(plan.model)
    batch = random_tokens(plan, BATCH[kind], plan.seq_len)
    runs = {
        "ours": step(plan, model, ours(plan, model, teacher, compiled=False), batch),
        "compiled": step(plan, model, ours(plan, model, teacher, compiled=True), batch),
    }
    rival = transformers_model(plan, liger=False)
    runs["transformers"] = step(plan, rival, theirs(rival, teacher), batch)
    if kind == CE and not plan.dry:
        fused = transformers_model(plan, liger=True)
        runs["liger"] = step(plan, fused, theirs(fused, None), batch)
    for way in list(runs):
        try:
            runs[way]()
            runs[way]()
        except torch.OutOfMemoryError:
            record.add(f"step/{kind}/{way}", "out_of_memory", [1.0], "")
            del runs[way]
            release()
    return runs


def measure_step(plan: Plan, record: Recorder) -> None:
    peak = measure_peak_flops(plan.device, Precision.bf16)
    record.add("step/matrix_product", "flops", [peak], "FLOP/s")
    for kind, batch in BATCH.items():
        runs = steps_of(plan, kind, record)
        tokens = batch * plan.seq_len
        flops = training_flops_per_token(plan.model, plan.seq_len)
        if kind == KD:
            flops += training_flops_per_token(plan.backbone, plan.seq_len) / 3
        seconds = alternate(timed(plan, runs), plan.rounds)
        rates = {way: [tokens / s for s in values] for way, values in seconds.items()}
        others = [rates[way] for way in ("transformers", "liger") if way in rates]
        for way, values in rates.items():
            record.add(f"step/{kind}/{way}", "tokens_per_s", values, "tokens/s")
            record.add(
                f"step/{kind}/{way}", "mfu", [rate * flops / peak for rate in values], "ratio"
            )
            if way in {"ours", "compiled"} and others:
                best = [max(each) for each in zip(*others, strict=True)]
                ratios = [a / b for a, b in zip(values, best, strict=True)]
                record.add(f"step/{kind}/{way}", "tokens_per_s_ratio", ratios, "ratio")
        del runs
        release()


def losses_of(plan: Plan, kind: str) -> dict[str, Callable[[], Tensor]]:
    """Make functions that compute the same mean loss in each way."""
    spec, device = plan.model, plan.device
    half = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(plan.long, spec.model_dim, **half).requires_grad_()
    weight = torch.empty(spec.vocab_size, spec.model_dim, **half).normal_(0, 0.02).requires_grad_()
    targets = torch.randint(spec.vocab_size, (plan.long,), device=device)
    teacher = None
    if kind == KD:
        width = plan.backbone.model_dim
        table = torch.empty(spec.vocab_size, width, **half).normal_(0, 0.02)
        teacher = Operands(torch.randn(plan.long, width, **half), table)
    share = 0.0 if teacher is None else 1.0
    student = Operands(hidden, weight)

    def plain() -> Tensor:
        logits = F.linear(hidden, weight).float()
        if teacher is None:
            return F.cross_entropy(logits, targets)
        log_q = torch.log_softmax(F.linear(*teacher).float(), dim=-1)
        log_p = torch.log_softmax(logits, dim=-1)
        return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")

    def chunks() -> Tensor:
        total = linear_losses(student, targets, teacher=teacher, kd_weight=share).total
        return total / len(targets)

    ways = {"ours": chunks, "plain": plain}
    if not plan.dry:
        ways["liger"] = liger_loss(student, targets, teacher)
    for way, loss in list(ways.items()):

        def run(loss: Callable[[], Tensor] = loss) -> Tensor:
            hidden.grad = weight.grad = None
            value = loss()
            value.backward()
            return value.detach()

        ways[way] = run
    return ways


def liger_loss(
    student: Operands, targets: Tensor, teacher: Operands | None
) -> Callable[[], Tensor]:
    """Liger's fused cross-entropy, or its fused forward KL."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    if teacher is None:
        fused = LigerFusedLinearCrossEntropyLoss()
        return lambda: fused(student.weight, student.hidden, targets)
    divergence = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: divergence(*student, *teacher, targets)


def measure_losses(plan: Plan, record: Recorder) -> None:
    for kind in (CE, KD):
        runs = losses_of(plan, kind)
        for way in list(runs):
            try:
                record.add(f"losses/{kind}/{way}", "loss", [float(runs[way]())], "nats/token")
                record.add(f"losses/{kind}/{way}", "peak_gib", [plan.peak_gib(runs[way])], "GiB")
            except torch.OutOfMemoryError:
                record.add(f"losses/{kind}/{way}", "out_of_memory", [1.0], "")
                del runs[way]
            release()
        found = alternate(timed(plan, runs), plan.rounds)
        for way, values in found.items():
            record.add(f"losses/{kind}/{way}", "ms", [1e3 * s for s in values], "ms")
        others = [values for way, values in found.items() if way != "ours"]
        best = [min(each) for each in zip(*others, strict=True)]
        ratios = [a / b for a, b in zip(found["ours"], best, strict=True)]
        record.add(f"losses/{kind}", "time_ratio", ratios, "ratio")
        del runs
        release()


def measure_memory(plan: Plan, record: Recorder) -> None:
    recipe = RecipeSettings(name="gpu", tokens=plan.long, batch_size=1)
    batch = random_tokens(plan, 1, plan.long)
    for kind in (CE, KD):
        for checkpointing in (False, True):
            case = f"memory/{kind}/{'checkpointing' if checkpointing else 'kept'}"
            with reported(record, case):
                with plan.device:
                    model = Decoder(plan.model)
                    teacher = Decoder(plan.backbone).bfloat16() if kind == KD else None
                model.checkpoint_layers = checkpointing
                run = step(plan, model, ours(plan, model, teacher, compiled=False), batch)
                peak = plan.peak_gib(run)
                trainer = TrainerSettings(
                    precision=Precision.bf16, activation_checkpointing=checkpointing
                )
                weight = 0.5 if kind == KD else 0.0
                asked = dataclasses.replace(recipe, kd_weight=weight)
                taught = plan.backbone if kind == KD else None
                need = step_memory(plan.model, asked, trainer, plan.long, taught).total / GIB
                record.add(case, "peak_gib", [peak], "GiB")
                record.add(case, "estimate_ratio", [need / peak if peak else 0.0], "ratio")
                del model, teacher, run


def measure_fit(plan: Plan, record: Recorder) -> None:
    from flash.data.corpus import PackedData
    from flash.data.module import PackedDataModule
    from flash.data.settings import DataKind, DataSettings
    from flash.data.tokenizer import load_tokenizer
    from flash.training.fit import fit

    batch, steps = (8, 4) if plan.dry else (16, 30)
    tokens = batch * plan.seq_len
    tokenizer = load_tokenizer(conf.ROOT / "backbones" / "tiny" / "tokenizer.json")
    path = str(conf.ROOT / "flash")
    source = {"kind": DataKind.folder, "path": path} if plan.dry else {"kind": DataKind.stdlib}
    with tempfile.TemporaryDirectory() as folder:
        settings = DataSettings(name="text", **source, seq_len=plan.seq_len)  # type: ignore[arg-type]
        data = PackedData(settings, tokenizer, batch_size=batch, seed=0, cache=Path(folder))
        loader = PackedDataModule(data).train_dataloader()
        start, loaded = time.perf_counter(), 0
        for found in islice(loader, 50):
            loaded += found.tokens.numel()
        loading = loaded / (time.perf_counter() - start)
        recipe = RecipeSettings(name="gpu", tokens=steps * tokens, batch_size=batch, lr=1e-5)
        trainer = TrainerSettings(
            accelerator="cpu" if plan.dry else "gpu",
            precision=Precision.bf16,
            micro_batch=4,
            compile=not plan.dry,
        )
        done = fit(Decoder(plan.model), data, recipe, trainer, show_progress=False)
    record.add("fit/training", "tokens_per_s", [done.tokens_per_s], "tokens/s")
    record.add("fit/training", "mfu", [done.mfu], "ratio")
    record.add("fit/loading", "tokens_per_s", [loading], "tokens/s")
    record.add("fit/loading", "loading_ratio", [loading / done.tokens_per_s], "ratio")


def run_tests(plan: Plan, record: Recorder) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-rf", "--tb=short"]
    # Warnings differ from version to version of PyTorch. A compiler takes minutes on a CPU.
    command += ["-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command += ["-k", "not compiled"] if plan.dry else []
    environment = {**os.environ, **({"FLASH_GPU_DRY_RUN": "1"} if plan.dry else {})}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        done = subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=conf.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, file=sys.stderr, flush=True)
        text = report.read_text("utf-8")
    from xml.etree import ElementTree

    suite = next(ElementTree.fromstring(text).iter("testsuite"))
    counts = {
        name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    record.add("tests", "passed", [counts["tests"] - failed - counts["skipped"]], "tests")
    record.add("tests", "failed", [failed], "tests")
    record.add("tests", "skipped", [counts["skipped"]], "tests")


MEASURES = {
    "tests": run_tests,
    "step": measure_step,
    "losses": measure_losses,
    "memory": measure_memory,
    "fit": measure_fit,
}


def machine(plan: Plan) -> str:
    """Describe processor, versions and commit as the first line."""
    command = ["git", "-C", str(conf.ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    name = "dry run on a CPU" if plan.dry else torch.cuda.get_device_name()
    values = {
        "benchmark": "gpu",
        "case": "machine",
        "metric": "cores",
        "value": os.cpu_count(),
        "unit": f"{name}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"commit {done.stdout.strip() or 'unknown'}",
        "n": 1,
        "spread": 0.0,
    }
    return json.dumps(values)


def run_part(part: str, limit_s: float, *, dry: bool, keep: Callable[[str], None]) -> None:
    """Run a part in a process of its own and keep each line as it comes."""
    command = [sys.executable, __file__, "--part", part, *(["--dry-run"] if dry else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(True)
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    for line in process.stdout:
        if line.startswith("{"):
            keep(line.rstrip())
    process.wait()
    timer.cancel()
    if process.returncode:
        code = process.returncode
        how = f"stopped after {limit_s:.0f} s" if stopped else f"exit code {code}"
        print(f"gpu.py: part {part}: {how}", file=sys.stderr, flush=True)
        line = {"benchmark": "gpu", "case": part, "metric": "incomplete", "value": 1.0}
        keep(json.dumps({**line, "unit": how, "n": 1, "spread": 0.0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="file of the lines; each is written at once")
    parser.add_argument("--minutes", type=float, default=8.0, help="duration of all parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--dry-run", action="store_true", default=SMOKE, help="tiny sizes on the CPU"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    plan = Plan(given.dry_run)
    if not plan.dry and not torch.cuda.is_available():
        sys.exit("gpu.py: found no CUDA device: expected one; --dry-run shows the script on a CPU")
    if given.part is not None:
        MEASURES[given.part](plan, Recorder("gpu"))
        return
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if given.out is not None:
            given.out.write_text("\n".join(lines) + "\n", "utf-8")

    keep(machine(plan))
    end = time.monotonic() + 60 * given.minutes
    for part in given.parts:
        left = end - time.monotonic()
        if left > 1 or plan.dry:
            limit_s = float("inf") if plan.dry else min(left, PARTS[part])
            run_part(part, limit_s, dry=plan.dry, keep=keep)


if __name__ == "__main__":
    main()
