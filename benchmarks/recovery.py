"""Recovery of the quality lost by pruning, at equal tokens, on the tiny backbone.

One architecture (6 layers of width 224, two without attention) is trained on 131,072 tokens with
three seeds of data order and initialization, by the recipes of conf/recipe: `scratch` (random
weights, learning rate of pretraining), `continue` (pruned, cross-entropy) and `distill` (pruned,
half cross-entropy and half forward KL to the backbone). `loss` is the held-out loss; `margin` is
its reduction relative to the case before, seed by seed.

The distilled model is then quantized to 8-bit activations and 4-bit weights: `ptq` without further
training, `qat` after 65,536 more tokens with recipe=qat, `more` after as many tokens of float
training. `rounded_loss` is their held-out loss with the rounding of the device.

Interrupted runs resume (runs/recovery). The benchmark draws docs/figures/recovery.svg (by kaleido,
which needs Chrome).
"""

import dataclasses
from pathlib import Path

import plotly.graph_objects as go
from record import SMOKE, Recorder, output

import conf
from flash.data.corpus import PackedData
from flash.model.backbone import Backbone
from flash.model.checkpoint import load
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.rounding.fake import fake_quantize
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.result import TrainResult
from flash.training.run import train
from flash.training.settings import Precision, RecipeSettings, TrainerSettings, TrainSettings
from flash.training.validation import validate
from flash.workspace import Workspace

TOKENS, FURTHER = 131_072, 65_536
SEEDS = range(1 if SMOKE else 3)
RUNS = Runs(output(conf.ROOT / "runs" / "recovery"))
FIGURES = output(conf.ROOT / "docs" / "figures")
ARCH = {"model_dim": 224, "ffn_dim": 448, "layer_types": "F-FF-F"}
TRAINER = TrainerSettings(precision=Precision.fp32)
DATA = conf.stdlib(tokenizer=str(conf.ROOT / "backbones/tiny/tokenizer.json"))
CASES = {"scratch": "pretrain", "continue": "continue", "distill": "distill"}


def run(name: str, recipe: RecipeSettings, seed: int, start: str | None = None) -> TrainResult:
    """Run one training, or read its result if it is finished."""
    backbone = conf.TINY
    arch: dict[str, object] = {} if start else ARCH
    if name == "scratch":
        random = conf.group("backbone/tiny_random", BackboneSettings)
        backbone = dataclasses.replace(random, arch={**(random.arch or {}), **ARCH})
        arch = {}
    return train(
        TrainSettings(
            backbone=backbone,
            data=DATA,
            recipe=recipe,
            trainer=TRAINER,
            logger=LoggerSettings(name="none", kind=LoggerKind.none),
            arch=arch,
            start=start,
            name=f"{name}_{seed}",
            seed=seed,
            runs=str(RUNS.root),
        )
    )


def recipe_of(name: str, tokens: int) -> RecipeSettings:
    found = conf.group(f"recipe/{name}", RecipeSettings)
    return conf.short(dataclasses.replace(found, tokens=tokens, batch_size=4))


def checkpoint(name: str, seed: int) -> str:
    return str(RUNS.model(f"{name}_{seed}") / "checkpoint")


def rounded_loss(name: str, seed: int, data: PackedData) -> float:
    """Compute the held-out loss of a trained model after quantization."""
    model = load(Path(checkpoint(name, seed)))
    fake_quantize(model)
    return validate(model, data, Precision.fp32).loss


def recovery(record: Recorder) -> dict[str, list[TrainResult]]:
    results = {
        case: [run(case, recipe_of(recipe, TOKENS), seed) for seed in SEEDS]
        for case, recipe in CASES.items()
    }
    losses = {case: [each.after.loss for each in found] for case, found in results.items()}
    before = [each.before.loss for each in results["continue"]]
    record.add("pruned", "loss", before, "nats/token")
    for case, values in losses.items():
        record.add(case, "loss", values, "nats/token")
    for worse, better in (("scratch", "continue"), ("continue", "distill")):
        margins = [a - b for a, b in zip(losses[worse], losses[better], strict=True)]
        record.add(better, "margin", margins, "nats/token")
    return results


def quantization_stages(record: Recorder, data: PackedData) -> None:
    aware = recipe_of("qat", FURTHER)
    for name, recipe in (("qat", aware), ("more", dataclasses.replace(aware, qat=False))):
        for seed in SEEDS:
            run(name, recipe, seed, start=checkpoint("distill", seed))
    losses = {"ptq": [rounded_loss("distill", seed, data) for seed in SEEDS]}
    losses |= {name: [rounded_loss(name, seed, data) for seed in SEEDS] for name in ("more", "qat")}
    for case, values in losses.items():
        record.add(case, "rounded_loss", values, "nats/token")
    margins = [a - b for a, b in zip(losses["more"], losses["qat"], strict=True)]
    record.add("qat", "margin", margins, "nats/token")


def draw(results: dict[str, list[TrainResult]]) -> None:
    """Plot training losses (except of distillation) and held-out losses before and after."""
    figure = go.Figure()
    for case, color in zip(results, ("#8a8f98", "#e8743b", "#2f6fde"), strict=True):
        for seed, result in enumerate(results[case]):
            curve = result.fit.curve if case != "distill" else []
            figure.add_scatter(
                x=[TOKENS * (i + 0.5) / len(curve) for i in range(len(curve))],
                y=list(curve),
                mode="lines",
                showlegend=False,
                line={"color": color, "width": 1},
                opacity=0.5,
            )
            figure.add_scatter(
                x=[0, TOKENS * 1.02],
                y=[result.before.loss, result.after.loss],
                mode="markers",
                name=case,
                legendgroup=case,
                showlegend=seed == 0,
                marker={"color": color, "size": 9},
            )
    figure.update_layout(template="plotly_white", width=760, height=440)
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title="loss [nats/token]: lines training, dots held out")
    FIGURES.mkdir(exist_ok=True)
    figure.write_image(FIGURES / "recovery.svg")


def main() -> None:
    record = Recorder("recovery")
    results = recovery(record)
    workspace = Workspace(
        runs=RUNS,
        backbone=Backbone.open(conf.TINY),
        data_settings=DATA,
        batch_size=recipe_of("continue", TOKENS).batch_size,
    )
    quantization_stages(record, workspace.data)
    draw(results)
    record.close()


if __name__ == "__main__":
    main()
