"""Distillation from cached top tokens of the teacher, compared with an online teacher.

The architecture, tokens and recipe are those of the distillation in benchmarks/recovery.py, on the
tiny backbone (vocabulary 2,048, fp32).

- `time_ratio`: seconds of a step relative to those with an online teacher, alternating in one
  process. `kept` reads the 16 likeliest tokens from the cache, `none` trains on the text alone.
  Filling the cache takes the forward passes of the teacher once for all students and is not
  included.
- `loss`: held-out loss after 32,768 tokens, by seed; `more_loss`: its excess over that
  with an online teacher, seed by seed. Cases are `recipe.kd_top_k` and, after p, `recipe.kd_top_p`.
- `bytes_per_token`: size of the files of the cache; `former_bytes_per_token`: that of the former
  format, int32 ids and float16 log-probabilities; `tokens_kept`: mean number per position;
  `decode_ms`: processor time to read and decode a batch of four sequences.

`python benchmarks/teacher.py`; finished runs are kept in runs/teacher and reused. With folders of
other teachers as arguments, only the sizes for these are measured, on 8,192 tokens each, and
printed.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
from record import SMOKE, Recorder, output
from recovery import ARCH, DATA, TRAINER, recipe_of

import conf
from flash.data.batch import collate
from flash.data.teacher_cache import TeacherCache
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.fit import fit
from flash.training.run import train
from flash.training.settings import RecipeSettings, TrainSettings
from flash.training.teacher import Teacher, teacher_of
from flash.workspace import Workspace, arch_of

TOKENS, SEEDS = 32_768, range(1)
ALONG: dict[str, float | None] = {"kd_top_k": None, "kd_top_p": None}
TOP: dict[str, dict[str, float | None]] = {
    f"top_{k}" + (f"_p{p}" if p else ""): {"kd_top_k": k, "kd_top_p": p}
    for k, p in ((4, None), (16, None), (16, 0.9), (64, 0.8))
}
TIMED = "top_16"
ROUNDS, STEPS = (1, 2) if SMOKE else (3, 12)
RUNS = Runs(output(conf.ROOT / "runs" / "teacher"))


def recipe(top: dict[str, float | None], tokens: int = TOKENS) -> RecipeSettings:
    return dataclasses.replace(recipe_of("distill", tokens), **top)


def loss(case: str, top: dict[str, float | None], seed: int) -> float:
    """Compute the held-out loss after distillation, or read that of a finished run."""
    settings = TrainSettings(
        backbone=conf.TINY,
        data=DATA,
        recipe=recipe(top),
        trainer=TRAINER,
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        arch=ARCH,
        name=f"{case}_{seed}",
        seed=seed,
        runs=str(RUNS.root),
    )
    return train(settings).after.loss


def losses(record: Recorder) -> None:
    along = [loss("along", ALONG, seed) for seed in SEEDS]
    record.add("along", "loss", along, "nats/token")
    for case, top in TOP.items():
        kept = [loss(case, top, seed) for seed in SEEDS]
        record.add(case, "loss", kept, "nats/token")
        more = [a - b for a, b in zip(kept, along, strict=True)]
        record.add(case, "more_loss", more, "nats/token")


def workspace_of(backbone: Backbone) -> Workspace:
    tokenizer = DATA.tokenizer if backbone.name == conf.TINY.name else None
    data = dataclasses.replace(DATA, tokenizer=tokenizer)
    batch_size = recipe(ALONG).batch_size
    return Workspace(runs=RUNS, backbone=backbone, data_settings=data, batch_size=batch_size)


def sizes(record: Recorder, workspace: Workspace, tokens: int, prefix: str = "") -> None:
    for case, top in TOP.items():
        taught = teacher_of(workspace.backbone, workspace.data, recipe(top, tokens), TRAINER, RUNS)
        assert isinstance(taught, TeacherCache)
        parts = sorted(taught.folder.iterdir())
        positions = DATA.seq_len * sum(len(taught.members(part)) for part in range(len(parts)))
        size = sum(path.stat().st_size for path in parts)
        record.add(prefix + case, "bytes_per_token", [size / positions], "bytes")
        k = taught.codec.top_k
        record.add(prefix + case, "former_bytes_per_token", [4 * k + 2 * (k + 1)], "bytes")
        counts: list[float] = []
        batch_ms: list[float] = []
        for start in range(0, len(taught.members(0)), 4):
            began = time.process_time()
            batch = collate([taught[i] for i in taught.members(0)[start : start + 4]])
            batch_ms.append(1e3 * (time.process_time() - began))
            assert batch.top_log_probs is not None
            counts.append(batch.top_log_probs[..., :-1].isfinite().sum(-1).float().mean().item())
        record.add(prefix + case, "tokens_kept", [sum(counts) / len(counts)], "tokens")
        record.add(prefix + case, "decode_ms", batch_ms, "ms")


def step_s(workspace: Workspace, teacher: Teacher | None, recipe: RecipeSettings) -> float:
    """Measure the median seconds of a step, data and optimizer included."""
    spec = arch_of(ARCH, workspace.backbone)
    torch.manual_seed(0)
    steps = dataclasses.replace(TRAINER, max_steps=STEPS)
    done = fit(Decoder(spec), workspace.data, recipe, steps, teacher=teacher, show_progress=False)
    return recipe.batch_size * DATA.seq_len / done.tokens_per_s


def times(record: Recorder, workspace: Workspace) -> None:
    along, kept, backbone = recipe(ALONG), recipe(TOP[TIMED]), workspace.backbone
    running = teacher_of(backbone, workspace.data, along, TRAINER, RUNS)
    taught = teacher_of(backbone, workspace.data, kept, TRAINER, RUNS)
    plain = dataclasses.replace(along, kd_weight=0.0)
    seconds: dict[str, list[float]] = {"along": [], "kept": [], "none": []}
    for _ in range(ROUNDS):
        seconds["along"].append(step_s(workspace, running, along))
        seconds["kept"].append(step_s(workspace, taught, kept))
        seconds["none"].append(step_s(workspace, None, plain))
    for case, values in seconds.items():
        record.add(case, "step_s", values, "s")
        ratios = [a / b for a, b in zip(values, seconds["along"], strict=True)]
        record.add(case, "time_ratio", ratios, "ratio")


def main() -> None:
    record = Recorder("teacher")
    for folder in map(Path, sys.argv[1:]):
        backbone = Backbone.open(BackboneSettings(name=folder.name, weights=str(folder)))
        sizes(record, workspace_of(backbone), tokens=4096, prefix=f"{folder.name}_")
    if sys.argv[1:]:
        return
    workspace = workspace_of(Backbone.open(conf.TINY))
    losses(record)
    sizes(record, workspace, TOKENS)
    times(record, workspace)
    record.close()


if __name__ == "__main__":
    main()
