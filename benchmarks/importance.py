"""Pruning by importance compared with pruning at random and in reverse order.

The metric is the held-out loss of the tiny backbone after cuts of FFN, width, layers and query
heads. The parts to keep are chosen by the paper's importance metrics (`activation`), at random
(median of 3 seeds) or in reverse order. Key heads are merged to their mean, or the one of a group
is kept whose query heads have the strongest output (`strongest`). Losses are measured right after
the cut and after a short recovery training (`/recovered`). The case `none` is the uncut backbone.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from record import SMOKE, Recorder, output

import conf
from flash.arch import ArchSpec
from flash.model.backbone import Backbone
from flash.model.checkpoint import build
from flash.model.weights import read_spec
from flash.paths import Runs
from flash.prune.importance import Importance
from flash.prune.pruning import prune, select
from flash.training.fit import fit
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from flash.training.validation import validate
from flash.workspace import Workspace

RECIPE = conf.short(
    RecipeSettings(name="recovery", tokens=32768, batch_size=2, lr=1e-3, warmup_ratio=0.1)
)
SEEDS, CUTS = ((0,), 1) if SMOKE else ((0, 1, 2), 8)


def _cuts(spec: ArchSpec) -> dict[str, ArchSpec]:
    return {
        "ffn_0.67": spec.replace(ffn_dim=384),
        "ffn_0.5": spec.replace(ffn_dim=288),
        "ffn_0.33": spec.replace(ffn_dim=192),
        "width_0.75": spec.replace(model_dim=192),
        "layers_0.75": spec.replace(layer_types=spec.layer_types[:6]),
        "layers_0.5": spec.replace(layer_types=spec.layer_types[:4]),
        "heads_0.5": spec.replace(num_heads=spec.num_heads // 2),
        "kv_heads_0.5": spec.replace(num_kv_heads=spec.num_kv_heads // 2),
    }


def _map(importance: Importance, change: Callable[[torch.Tensor], torch.Tensor]) -> Importance:
    return dataclasses.replace(
        importance,
        ffn=change(importance.ffn),
        model=change(importance.model),
        layers=change(importance.layers),
        heads=change(importance.heads),
    )


def _random(importance: Importance, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return _map(importance, lambda scores: torch.rand(scores.shape, generator=generator))


def _strongest(folder: Path, scores: Importance, spec: ArchSpec) -> dict[str, torch.Tensor]:
    """Weights with one key head of each group of the backbone's, in place of their mean."""
    weights, merged = prune(folder, scores, spec), spec.num_kv_heads
    whole = read_spec(folder).num_kv_heads
    heads = prune(folder, scores, spec.replace(num_kv_heads=whole))
    for slot, layer in enumerate(select(scores, spec).layers.tolist()):
        each = scores.heads[layer].unflatten(0, (merged, whole // merged, -1)).sum(dim=-1)
        best = torch.arange(merged), each.argmax(dim=1)
        for part in ("k_proj", "v_proj"):
            name = f"model.layers.{slot}.self_attn.{part}.weight"
            groups = heads[name].unflatten(0, (merged, whole // merged, spec.head_dim))
            weights[name] = groups[best].flatten(0, 1)
    return weights


def main() -> None:
    record = Recorder("importance")
    runs = Runs(output(Path("runs")))
    backbone = Backbone.open(conf.TINY)
    data = conf.stdlib()
    workspace = Workspace(
        runs=runs, backbone=backbone, data_settings=data, batch_size=RECIPE.batch_size
    )
    assert backbone.folder is not None
    scores = workspace.importance(RECIPE.calibration_tokens)
    ways = {
        "activation": [scores],
        "random": [_random(scores, seed) for seed in SEEDS],
        "reversed": [_map(scores, torch.neg)],
    }
    whole = validate(backbone.load(), workspace.data, Precision.bf16)
    record.add("none", "heldout_loss", [whole.loss], "nats/token")
    for cut, spec in list(_cuts(backbone.spec).items())[:CUTS]:
        made = {way: [prune(backbone.folder, s, spec) for s in each] for way, each in ways.items()}
        if spec.num_kv_heads < backbone.spec.num_kv_heads:  # all three ways have the same mean
            made = {"mean": made["activation"]}
            made["strongest"] = [_strongest(backbone.folder, scores, spec)]
        for way, choices in made.items():
            before, after = [], []
            for weights in choices:
                L.seed_everything(0, verbose=False)
                model = build(spec, weights)
                before.append(validate(model, workspace.data, Precision.bf16).loss)
                fit(model, workspace.data, RECIPE, TrainerSettings(), show_progress=False)
                after.append(validate(model, workspace.data, Precision.bf16).loss)
            record.add(f"{cut}/{way}", "heldout_loss", before, "nats/token")
            record.add(f"{cut}/{way}/recovered", "heldout_loss", after, "nats/token")
    record.close()


if __name__ == "__main__":
    main()
