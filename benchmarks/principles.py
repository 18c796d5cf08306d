"""Tests of the paper's design principles (Sec. 3.5 and 4) on the tiny backbone.

`python benchmarks/principles.py [STUDY ...]` runs the named studies; without names it runs all and
keeps the results. Each study trains the models it needs (kept in benchmarks/data/principles.jsonl,
so it can be killed and resumed), prints its results and draws docs/figures/STUDY.svg (by kaleido,
which needs Chrome or Chromium):

- `scratch`: pruned against random start at equal tokens, and the rankings of 12 candidates by both.
  The random start gets the higher learning rate that suits it.
- `skip_runs`: 3 and 4 skipped layers of 8, spread out or consecutive, at the same latency.
- `skip_sliding`: 1 to 4 layers without attention, or with a sliding window in either lowered form
  (stock ring buffer, `ring`), against narrower FFNs.
- `depth_width`: deep and thin to shallow and wide, at equal parameters, then at equal latency.
- `ranking`: rank correlation of 12 candidates between short trainings and a long one.

Latency is the time to the first token of 2048 by counted work at nominal rates, as in
benchmarks/tabular.py. The studies therefore give the same results on every machine, and the cost of
a form of sliding windows is the work of its operators.
"""

import itertools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import lightning as L
import numpy as np
import plotly.graph_objects as go
import rows
import tabular
from record import SMOKE, Recorder, output
from scipy import stats

import conf
from flash.arch import ArchSpec, Attention, SearchSpace, count_parameters
from flash.lowering.settings import SlidingForm
from flash.model.backbone import Backbone
from flash.model.checkpoint import build
from flash.model.decoder import Decoder
from flash.paths import Runs
from flash.progress import progress
from flash.prune.importance import Importance
from flash.prune.pruning import prune
from flash.training.fit import fit
from flash.training.settings import RecipeSettings, Schedule, TrainerSettings
from flash.training.validation import validate
from flash.workspace import Workspace

DATA = conf.ROOT / "benchmarks" / "data" / "principles.jsonl"
FIGURES = output(conf.ROOT / "docs" / "figures")
RUNS = Runs(output(conf.ROOT / "runs"))
TOKENS = 16384
BUDGETS = (2048, 4096, 8192, TOKENS, 2 * TOKENS)
CANDIDATES, DEPTHS, PER_RUN, SETS = 12, range(3, 9), 5, 3
if SMOKE:
    BUDGETS = (TOKENS, 2 * TOKENS)
    CANDIDATES, DEPTHS, PER_RUN, SETS = 3, (7, 8), 1, 1


@cache
def space() -> SearchSpace:
    """Return the space `tiny`."""
    return conf.space("tiny")


def candidates() -> list[ArchSpec]:
    """Draw stratified candidates with a fixed seed."""
    return space().stratified(np.random.default_rng(0), CANDIDATES)


def recipe(tokens: int, start: str) -> RecipeSettings:
    """Return the recipe of a trial; from scratch with the learning rate of pretraining."""
    recipe = RecipeSettings(
        name="principles",
        tokens=tokens,
        batch_size=2,
        lr=1e-3 if start == "pruned" else 3e-3,
        warmup_ratio=0.1,
        decay_ratio=0.4,
        schedule=Schedule.wsd,
    )
    return conf.short(recipe)


@cache
def _workspace() -> Workspace:
    return Workspace(
        runs=RUNS,
        backbone=Backbone.open(conf.TINY),
        data_settings=conf.stdlib(validation_sequences=32),
        batch_size=recipe(TOKENS, "pruned").batch_size,
    )


@cache
def _scores() -> Importance:
    return _workspace().importance(recipe(TOKENS, "pruned").calibration_tokens)


class Trained:
    """Held-out losses by (architecture, start, tokens), trained on demand."""

    def __init__(self) -> None:
        self._known = {
            (row["spec"], row["start"], row["tokens"]): row["loss"]
            for row in rows.read(output(DATA))
        }

    def losses(
        self, specs: Sequence[ArchSpec], start: str = "pruned", tokens: int = TOKENS
    ) -> list[float]:
        """Return the loss of each architecture [nats a token]."""
        tied = [spec.as_program() for spec in specs]
        missing = [spec for spec in dict.fromkeys(tied) if (spec, start, tokens) not in self._known]
        for spec in progress(missing, f"{start}, {tokens} tokens"):
            began = time.perf_counter()
            loss, curve = self._train(spec, start, tokens)
            row = {"spec": spec.to_dict(), "start": start, "tokens": tokens, "loss": loss}
            seconds = round(time.perf_counter() - began, 1)
            rows.append(output(DATA), {**row, "curve": curve, "seconds": seconds})
            self._known[spec, start, tokens] = loss
        return [self._known[spec, start, tokens] for spec in tied]

    def _train(self, spec: ArchSpec, start: str, tokens: int) -> tuple[float, list[float]]:
        """Train one model; return its held-out loss and its training losses."""
        chosen, trainer = recipe(tokens, start), TrainerSettings()
        workspace = _workspace()
        L.seed_everything(0, verbose=False)
        model = Decoder(spec)
        if start == "pruned":
            folder = workspace.backbone.folder
            assert folder is not None
            model = build(spec, prune(folder, _scores(), spec))
        done = fit(model, workspace.data, chosen, trainer, show_progress=False)
        loss = validate(model, workspace.data, trainer.precision).loss
        return loss, [round(part, 4) for part in done.curve]


def ttft_ms(specs: Sequence[ArchSpec], form: SlidingForm = SlidingForm.stock) -> list[float]:
    """Compute the nominal time to the first token of 2048 [ms]."""
    return [tabular.nominal_ms(spec, form)["prefill_ms"] for spec in specs]


def scratch(trained: Trained, record: Recorder) -> go.Figure:
    """Compare pruned with random starts."""
    specs, tokens = candidates(), 2 * TOKENS
    pruned, random = (trained.losses(specs, start, tokens) for start in ("pruned", "scratch"))
    gaps = [b - a for a, b in zip(pruned, random, strict=True)]
    record.add("scratch", "pruned_better_by", gaps, "nats")
    record.add("scratch", "kendall_tau", [_tau(pruned, random)], "ratio")
    figure = go.Figure()
    labels = [f"{count_parameters(spec).total / 1e6:.1f}M" for spec in specs]
    figure.add_scatter(
        x=random, y=pruned, text=labels, mode="markers+text", textposition="top left"
    )
    return _axes(figure, "loss from random weights", "loss from inherited weights")


def skip_runs(trained: Trained, record: Recorder) -> go.Figure:
    """Compare skipped layers that are spread out with consecutive ones."""
    rng, whole = np.random.default_rng(0), space().base
    figure = go.Figure()
    for skipped in (3, 4):
        by_run: dict[int, list[ArchSpec]] = {}
        every = list(itertools.combinations(range(1, whole.num_layers), skipped))
        for i in rng.permutation(len(every)):
            spec = _replaced(whole, every[i], Attention.skip_attention)
            by_run.setdefault(spec.longest_efficient_run, []).append(spec)
        for run in sorted(by_run):
            losses = trained.losses(by_run[run][:PER_RUN])
            record.add(f"skip_runs/{skipped}_skipped/run_{run}", "loss", losses, "nats")
            figure.add_box(
                x=[run] * len(losses),
                y=losses,
                name=f"{skipped} of 8 layers skipped",
                legendgroup=skipped,
                showlegend=run == min(by_run),
                marker_color="#2f6fde" if skipped == 3 else "#e8743b",
                boxpoints="all",
            )
    return _axes(figure, "longest run of skipped layers", "held-out loss [nats/token]")


def skip_sliding(trained: Trained, record: Recorder) -> go.Figure:
    """Compare skipped layers, sliding windows in two forms, and narrower FFNs."""
    rng, whole = np.random.default_rng(0), space().base
    sets = []
    for num in (1, 2, 3, 4):
        every = [
            each
            for each in itertools.combinations(range(1, whole.num_layers), num)
            if all(b - a > 1 for a, b in itertools.pairwise(each))
        ]
        sets += [every[int(i)] for i in rng.permutation(len(every))[:SETS]]
    skipped = [_replaced(whole, each, Attention.skip_attention) for each in sets]
    sliding = [_replaced(whole, each, Attention.sliding_attention) for each in sets]
    narrower = [whole.replace(ffn_dim=dim) for dim in (192, 320, 448, 576)]
    series = {
        "skipped": (skipped, SlidingForm.stock),
        "sliding, stock ring buffer": (sliding, SlidingForm.stock),
        "sliding, ring": (sliding, SlidingForm.ring),
        "full attention, narrower FFN": (narrower, SlidingForm.stock),
    }
    figure, full_ms = go.Figure(), ttft_ms([whole])[0]
    for name, (specs, form) in series.items():
        losses, times = trained.losses(specs), ttft_ms(specs, form)
        case = f"skip_sliding/{name.replace(', ', '_').replace(' ', '_')}"
        for num in (1, 2, 3, 4):
            of = [i for i, each in enumerate(sets) if len(each) == num]
            if specs is narrower:
                of, num = [num - 1], narrower[num - 1].ffn_dim
            record.add(f"{case}/{num}", "loss", [losses[i] for i in of], "nats")
            record.add(f"{case}/{num}", "ttft_ratio", [times[i] / full_ms for i in of], "ratio")
        figure.add_scatter(x=times, y=losses, name=name, mode="markers", marker_size=9)
    return _axes(figure, "nominal TTFT at 2048 tokens [ms]", "held-out loss [nats/token]")


def depth_width(trained: Trained, record: Recorder) -> go.Figure:
    """Compare deep and thin with shallow and wide architectures."""
    whole = space().base
    grid = [
        whole.replace(model_dim=dim, ffn_dim=ffn, layer_types=(Attention.full_attention,) * depth)
        for depth, dim, ffn in itertools.product(DEPTHS, range(128, 257, 32), range(192, 577, 32))
    ]
    amounts = {
        "parameters": np.array([count_parameters(spec).total / 1e6 for spec in grid]),
        "latency": np.array(ttft_ms(grid)),
    }
    figure = go.Figure()
    shares = {"parameters": (0.45, 0.6), "latency": (0.6, 0.75)}
    for what, values in amounts.items():
        top = values[grid.index(whole)]
        for share in shares[what]:
            chosen = [_nearest(grid, values, share * top, depth) for depth in DEPTHS]
            specs = [spec for spec in chosen if spec is not None]
            losses = trained.losses(specs)
            for spec, loss in zip(specs, losses, strict=True):
                case = f"depth_width/{share:.0%}_{what}/{spec.num_layers}_layers"
                record.add(case, "loss", [loss], "nats")
                record.add(case, "model_dim", [spec.model_dim], "channels")
            figure.add_scatter(
                x=[spec.num_layers for spec in specs],
                y=losses,
                text=[f"{spec.model_dim}/{spec.ffn_dim}" for spec in specs],
                textposition="top center",
                name=f"{share:.0%} of the backbone's {what}",
                mode="lines+markers+text",
            )
    return _axes(figure, "layers (labels: width / FFN width)", "held-out loss [nats/token]")


def ranking(trained: Trained, record: Recorder) -> go.Figure:
    """Compare rankings after short trainings with that after a long one."""
    specs = candidates()
    losses = {tokens: trained.losses(specs, tokens=tokens) for tokens in BUDGETS}
    figure = go.Figure()
    for tokens in BUDGETS[:-1]:
        tau = _tau(losses[tokens], losses[BUDGETS[-1]])
        record.add(f"ranking/{tokens}", "kendall_tau", [tau], "ratio")
    for i, spec in enumerate(specs):
        ys = [losses[tokens][i] for tokens in BUDGETS]
        figure.add_scatter(x=BUDGETS, y=ys, name=str(spec), mode="lines+markers")
    figure.update_xaxes(type="log", tickvals=BUDGETS, ticktext=[f"{n:,}" for n in BUDGETS])
    figure.update_layout(showlegend=False)
    return _axes(figure, "tokens of continued pretraining", "held-out loss [nats/token]")


def _replaced(spec: ArchSpec, layers: Sequence[int], kind: Attention) -> ArchSpec:
    kinds = [kind if i in layers else each for i, each in enumerate(spec.layer_types)]
    return spec.replace(layer_types=tuple(kinds))


def _nearest(
    grid: Sequence[ArchSpec], values: np.ndarray, wanted: float, depth: int
) -> ArchSpec | None:
    """Find the member of this depth, within 3 %, nearest to the backbone's ratio of widths."""
    ratio = space().base.ffn_dim / space().base.model_dim
    fits = [
        spec
        for spec, value in zip(grid, values, strict=True)
        if spec.num_layers == depth and abs(value / wanted - 1) <= 0.03
    ]
    return min(fits, key=lambda s: abs(np.log(s.ffn_dim / s.model_dim / ratio)), default=None)


def _tau(a: Sequence[float], b: Sequence[float]) -> float:
    return float(stats.kendalltau(a, b)[0])


def _axes(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        xaxis_title=x,
        yaxis_title=y,
        width=760,
        height=460,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return figure


STUDIES: dict[str, Callable[[Trained, Recorder], go.Figure]] = {
    study.__name__: study for study in (scratch, skip_runs, skip_sliding, depth_width, ranking)
}


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*(LeafSpec|srun).*")
    names = sys.argv[1:] or list(STUDIES)
    unknown = [name for name in names if name not in STUDIES]
    if unknown:
        raise SystemExit(f"{unknown[0]}: expected one of {', '.join(STUDIES)}")
    record, trained = Recorder("principles"), Trained()
    for name in names:
        figure = STUDIES[name](trained, record)
        FIGURES.mkdir(exist_ok=True)
        figure.write_image(FIGURES / f"{name}.svg")
    if len(names) == len(STUDIES):
        record.close()


if __name__ == "__main__":
    main()
