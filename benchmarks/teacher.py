"""Distillation from cached top tokens of the teacher, compared with an online teacher.

The architecture, tokens and recipe are those of the distillation in benchmarks/recovery.py, on the
tiny backbone (vocabulary 2,048, fp32).

- `time_ratio`: seconds of a step relative to those with an online teacher, alternating in one
  process. `kept` reads the 16 likeliest tokens from the cache, `none` trains on the text alone.
  Filling the cache takes the forward passes of the teacher once for all students and is not
  included.
- `loss`: held-out loss after 131,072 tokens with three seeds; `more_loss`: its excess over that
  with an online teacher, seed by seed.
- `bytes_per_token`: size of the cache on disk.

`python benchmarks/teacher.py`; finished runs are kept in runs/teacher and reused.
"""

import dataclasses

import torch
from record import Recorder
from recovery import ARCH, DATA, TRAINER, recipe_of

import conf
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.paths import Runs
from flash.training.fit import fit
from flash.training.run import train
from flash.training.settings import LoggerKind, LoggerSettings, RecipeSettings, TrainSettings
from flash.training.teacher import Teacher, teacher_of
from flash.workspace import Workspace, arch_of

TOKENS, SEEDS = 131_072, range(3)
TOP_K = (4, 16)
ROUNDS, STEPS, TIMED_K = 5, 12, 16
RUNS = Runs(conf.ROOT / "runs" / "teacher")


def loss(top_k: int | None, seed: int) -> float:
    """Compute the held-out loss after distillation, or read that of a finished run."""
    settings = TrainSettings(
        backbone=conf.TINY,
        data=DATA,
        recipe=dataclasses.replace(recipe_of("distill", TOKENS), kd_top_k=top_k),
        trainer=TRAINER,
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        arch=ARCH,
        name=f"top_{top_k}_{seed}",
        seed=seed,
        runs=str(RUNS.root),
    )
    return train(settings).after.loss


def losses(record: Recorder) -> None:
    along = [loss(None, seed) for seed in SEEDS]
    record.add("along", "loss", along, "nats/token")
    for k in TOP_K:
        kept = [loss(k, seed) for seed in SEEDS]
        record.add(f"top_{k}", "loss", kept, "nats/token")
        more = [a - b for a, b in zip(kept, along, strict=True)]
        record.add(f"top_{k}", "more_loss", more, "nats/token")
        record.add(f"top_{k}", "bytes_per_token", [4 * k + 2 * (k + 1)], "bytes")


def step_s(workspace: Workspace, teacher: Teacher | None, recipe: RecipeSettings) -> float:
    """Measure the median seconds of a step, data and optimizer included."""
    spec = arch_of(ARCH, workspace.backbone)
    torch.manual_seed(0)
    steps = dataclasses.replace(TRAINER, max_steps=STEPS)
    done = fit(Decoder(spec), workspace.data, recipe, steps, teacher=teacher, show_progress=False)
    return recipe.batch_size * DATA.seq_len / done.tokens_per_s


def times(record: Recorder) -> None:
    along = recipe_of("distill", TOKENS)
    kept = dataclasses.replace(along, kd_top_k=TIMED_K)
    backbone = Backbone.open(conf.TINY)
    workspace = Workspace(
        runs=RUNS, backbone=backbone, data_settings=DATA, batch_size=along.batch_size
    )
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
    times(record)
    losses(record)
    record.close()


if __name__ == "__main__":
    main()
