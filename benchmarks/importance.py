"""Pruning by importance compared with pruning at random and in reverse order.

The metric is the held-out loss of the tiny backbone after cuts of FFN, width and layers. The parts
to keep are chosen by the paper's importance metrics (`activation`), at random (median of 3 seeds)
or in reverse order. Losses are measured right after the cut and after a short recovery training
(`/recovered`). The case `none` is the uncut backbone.
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
from flash.paths import Runs
from flash.prune.importance import Importance
from flash.prune.pruning import prune
from flash.training.fit import fit
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from flash.training.validation import validate
from flash.workspace import Workspace

RECIPE = conf.short(
    RecipeSettings(name="recovery", tokens=32768, batch_size=2, lr=1e-3, warmup_ratio=0.1)
)
SEEDS, CUTS = ((0,), 1) if SMOKE else ((0, 1, 2), 6)


def _cuts(spec: ArchSpec) -> dict[str, ArchSpec]:
    return {
        "ffn_0.67": spec.replace(ffn_dim=384),
        "ffn_0.5": spec.replace(ffn_dim=288),
        "ffn_0.33": spec.replace(ffn_dim=192),
        "width_0.75": spec.replace(model_dim=192),
        "layers_0.75": spec.replace(layer_types=spec.layer_types[:6]),
        "layers_0.5": spec.replace(layer_types=spec.layer_types[:4]),
    }


def _map(importance: Importance, change: Callable[[torch.Tensor], torch.Tensor]) -> Importance:
    return dataclasses.replace(
        importance,
        ffn=change(importance.ffn),
        model=change(importance.model),
        layers=change(importance.layers),
    )


def _random(importance: Importance, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return _map(importance, lambda scores: torch.rand(scores.shape, generator=generator))


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
        for way, choices in ways.items():
            before, after = [], []
            for choice in choices:
                L.seed_everything(0, verbose=False)
                model = build(spec, prune(backbone.folder, choice, spec))
                before.append(validate(model, workspace.data, Precision.bf16).loss)
                fit(model, workspace.data, RECIPE, TrainerSettings(), show_progress=False)
                after.append(validate(model, workspace.data, Precision.bf16).loss)
            record.add(f"{cut}/{way}", "heldout_loss", before, "nats/token")
            record.add(f"{cut}/{way}/recovered", "heldout_loss", after, "nats/token")
    record.close()


if __name__ == "__main__":
    main()
