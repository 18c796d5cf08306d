"""Tabular benchmarks for samplers: every member of a small space, pruned and trained.

`python benchmarks/tabular.py [TABLE] [--reverse] [--limit N]` goes through all members of a space
of `TABLES` in a fixed random order, evaluates each as a trial of a search is evaluated, and appends
one line of JSON for each to `benchmarks/data/TABLE.jsonl`. It can be stopped or killed at any time
and resumes with the missing members. A second process that starts from the other end, with
`--reverse`, shares the work. The first `NOISE_SPECS` candidates are also trained with a second seed
(another order of the text), which shows the noise of a loss.

A line holds `spec`, `seed`, `loss` (nats a token, or null with a `reason`), `prefill_ms`,
`decode_ms`, `tokens`, `precision`, `seconds`. Lines without a precision were computed in bf16;
fp32, for processors on which bf16 is slow, gives the same losses to 0.0007 nats, a tenth of the
effect of another seed. The latencies are the work of the lowered program, counted by
flash.latency.cost_model at a prompt and a context of 2048 tokens with ring caches, summed at the
rates of a nominal core. They are a fixed function of the spec, so the table depends on no device.
"""

import argparse
import dataclasses
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rows
from record import SMOKE, Recorder, output

import conf
from flash.arch import ArchSpec, Attention, Choices, FfnChoices, SearchSpace, SpaceSettings
from flash.device.workload import Point
from flash.latency.cost_model import SpecTable, nominal_work_ms
from flash.lowering.settings import AttentionForm, LoweringSettings, SlidingForm
from flash.model.backbone import Backbone
from flash.paths import Runs
from flash.progress import progress_bar
from flash.search.evaluate import ShortTraining
from flash.search.loop import EvaluationError
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from flash.workspace import Workspace

SPACE = SpaceSettings(
    name="tabular",
    num_layers=Choices(min=5, max=6),
    model_dim=Choices(min=192, max=256, step=64),
    ffn_dim=FfnChoices(min=320, max=576, step=256),
    max_efficient_run=1,  # keeps all kinds and a space small enough to exhaust
)
"""512 members: 128 patterns, two widths, two FFN widths."""
WIDE = SpaceSettings(
    name="wide",
    num_layers=Choices(min=5, max=5),
    model_dim=Choices(min=256, max=256),
    ffn_dim=FfnChoices(min=192, max=576, step=384, per_layer=True),
    num_kv_heads=[1, 2],
    kinds=[Attention.full_attention, Attention.skip_attention],
    max_efficient_run=1,
)
"""832 members: 13 patterns, two FFN widths in each of 5 layers, one or two key heads."""
UNIFORM = dataclasses.replace(
    WIDE, name="uniform", ffn_dim=FfnChoices(min=192, max=576, step=96), num_kv_heads=None
)
"""65 members: the same patterns with one of five FFN widths, so that it has mean widths, too."""
TABLES = {"tiny_tabular": [SPACE], "tiny_wide": [WIDE, UNIFORM]}
"""Spaces whose members are in a table, by its name."""
DATA = conf.stdlib(validation_sequences=16)
RECIPE = conf.short(
    RecipeSettings(name="tabular", tokens=12288, batch_size=1, lr=1e-3, warmup_ratio=0.1)
)
NOISE_SPECS = 6
LIMIT = 2 if SMOKE else None
"""Number of candidates to train in this run."""


def space(settings: SpaceSettings = SPACE) -> SearchSpace:
    """Return a space whose members are in a table."""
    return SearchSpace(settings, Backbone.open(conf.TINY).spec)


def path(table: str = "tiny_tabular") -> Path:
    """Return the file of a table."""
    return conf.ROOT / "benchmarks" / "data" / f"{table}.jsonl"


def members(space: SearchSpace) -> list[ArchSpec]:
    """List all members of a small space, in an order that only depends on the space."""
    smallest = space.make(
        space.model_dims[0], space.ffn_dims[0], (space.kinds[0],) * space.depths[0]
    )
    found = {smallest: None}
    queue = [smallest]
    while queue:
        for spec in space.neighbors(queue.pop()):
            if spec not in found:
                found[spec] = None
                queue.append(spec)
    assert len(found) == space.count()
    ordered = sorted(found, key=ArchSpec.to_json)
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


def tasks(table: str) -> list[tuple[ArchSpec, int]]:
    """List the pairs (candidate, seed) of a table in the order in which they are trained."""
    specs = list(dict.fromkeys(spec for each in TABLES[table] for spec in members(space(each))))
    repeated = [(spec, seed) for spec in specs[:NOISE_SPECS] for seed in (0, 1)]
    return repeated + [(spec, 0) for spec in specs[NOISE_SPECS:]]


def read(table: str = "tiny_tabular") -> list[dict[str, Any]]:
    """Read the lines of a table so far."""
    return rows.read(path(table))


def done(file: Path) -> set[tuple[ArchSpec, int]]:
    """Return the pairs (candidate, seed) that are in a file."""
    return {(row["spec"], row["seed"]) for row in rows.read(file)}


def nominal_ms(spec: ArchSpec, form: SlidingForm = SlidingForm.ring) -> dict[str, float]:
    """Compute the latencies of one core at nominal rates [ms]."""
    # Forms of attention with which the table was made.
    lowering = LoweringSettings(sliding=form, attention=AttentionForm.sdpa, prefill_last_only=False)
    return {
        f"{point.phase.value}_ms": float(
            nominal_work_ms(SpecTable.of([spec]), point, lowering, lowering.chunk).sum()
        )
        for point in (Point.parse("prefill_2048"), Point.parse("decode_2048"))
    }


def evaluators(precision: Precision) -> dict[int, ShortTraining]:
    """Return the evaluator of each seed."""
    trainer = TrainerSettings(precision=precision)
    backbone, runs, made = Backbone.open(conf.TINY), Runs(output(conf.ROOT / "runs")), {}
    for seed in (0, 1):
        workspace = Workspace(
            runs=runs,
            backbone=backbone,
            data_settings=DATA,
            batch_size=RECIPE.batch_size,
            seed=seed,
        )
        importance = workspace.importance(RECIPE.calibration_tokens)
        made[seed] = ShortTraining(workspace, importance, RECIPE, trainer, seed)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", nargs="?", choices=TABLES, default="tiny_tabular")
    parser.add_argument("--reverse", action="store_true", help="begin with the last")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help="stop after N")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    wanted = tasks(arguments.table)[:: -1 if arguments.reverse else 1]
    table = output(path(arguments.table))
    finished = done(table)
    left = [task for task in wanted if task not in finished][: arguments.limit]
    precision = Precision[arguments.precision]
    evaluate = evaluators(precision) if left else {}
    with progress_bar("tabular", len(left), unit="candidate") as bar:
        for number, (spec, seed) in enumerate(left):
            if (spec, seed) in done(table):  # done by the other process meanwhile
                continue
            start = time.perf_counter()
            row: dict[str, Any] = {"spec": spec.to_dict(), "seed": seed, "tokens": RECIPE.tokens}
            row["precision"] = precision.name
            try:
                row["loss"] = evaluate[seed](spec, number).loss
            except EvaluationError as error:
                row |= {"loss": None, "reason": str(error)}
            rows.append(table, {**row, **nominal_ms(spec), "seconds": time.perf_counter() - start})
            bar.update()
    Recorder("tabular").add(arguments.table, "rows", [len(rows.read(table))], "rows")


if __name__ == "__main__":
    main()
