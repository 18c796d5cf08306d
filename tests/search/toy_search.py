"""Small space with known loss and latency, and a search on it that can be killed."""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flash.arch import (
    ArchSpec,
    Attention,
    CacheFormat,
    Choices,
    FfnChoices,
    Quantization,
    SearchSpace,
    SpaceSettings,
    kv_cache_bytes,
    weight_bytes,
)
from flash.config import one_line_errors
from flash.search.fingerprint import space_fingerprint
from flash.search.loop import search
from flash.search.objectives import Objective, Problem
from flash.search.quality import Quality, TaskError
from flash.search.settings import Sampler, SearchSettings
from flash.search.study import Study, open_study
from flash.training.loss_curve import Watch

BACKBONE = ArchSpec(
    model_dim=256,
    ffn_dim=768,
    layer_types=(Attention.full_attention,) * 8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
)


def make_space(depth: int = 8, min_depth: int = 4, min_dim: int = 128) -> SearchSpace:
    settings = SpaceSettings(
        name="toy",
        num_layers=Choices(min=min_depth, max=depth),
        model_dim=Choices(min=min_dim, max=256, step=32),
        ffn_dim=FfnChoices(min=256, max=768, step=64),
    )
    return SearchSpace(settings, BACKBONE)


def make_wide_space() -> SearchSpace:
    """Make a space with FFN widths by layer, and a choice of heads and vocabularies."""
    widths = FfnChoices(min=256, max=768, step=64, per_layer=True)
    few = {"num_heads": [2, 4], "num_kv_heads": [1, 2], "vocab_size": [256, 512]}
    settings = replace(make_space().settings, ffn_dim=widths, **few)
    return SearchSpace(settings, BACKBONE)


def loss(spec: ArchSpec) -> float:
    """Compute a loss that falls with every size; early layers help most."""
    weights = np.exp(-np.linspace(0.0, 2.0, spec.num_layers))
    harm = {"F": 0.0, "S": 0.3, "-": 1.0}
    missing = weights @ [harm[letter] for letter in spec.pattern] / weights.sum()
    ffns = weights @ np.array(spec.ffn_dims, dtype=float) ** -0.5 / weights.sum()
    few = (
        0.1 * (4 - spec.num_heads) + 0.02 * (2 - spec.num_kv_heads) + (512 - spec.vocab_size) / 1e4
    )
    sizes = 8 * spec.model_dim**-0.5 + 6 * ffns + 3 / spec.num_layers + few
    return float(2.0 + sizes + 0.8 * missing + 0.05 * spec.longest_efficient_run)


def latency(specs: Sequence[ArchSpec]) -> np.ndarray:
    cost = {"F": 4.0, "S": 3.6, "-": 0.0}
    rows = [
        sum(cost[letter] for letter in spec.pattern) * spec.model_dim / 256 * spec.num_heads / 4
        + spec.model_dim * sum(spec.ffn_dims) / 20000
        + spec.model_dim * (spec.vocab_size - 512) / 20000
        for spec in specs
    ]
    return np.array(rows)


QUESTIONS = 400
TASK = "error_pct:toy"


def errors(spec: ArchSpec, questions: int = QUESTIONS) -> dict[str, TaskError]:
    """Compute the error in a task that needs the late layers, of which the loss needs least."""
    late = spec.pattern[spec.num_layers // 2 :]
    missing = (late.count("-") + 0.2 * late.count("S")) / len(late)
    share = 0.3 + 0.4 * missing + 0.2 * (256 - spec.model_dim) / 256 + 0.02 * (loss(spec) - 3)
    wrong = round(share * questions)
    stderr_pct = 100 * (wrong / questions * (1 - wrong / questions) / questions) ** 0.5
    return {TASK: TaskError(100 * wrong / questions, stderr_pct, questions)}


def make_settings(**changes: object) -> SearchSettings:
    values = {"study": "toy", "trials": 20, "batch": 4, "startup_trials": 8, "pool_size": 128}
    values |= {"max_loss_increase": 1.0}
    return SearchSettings(**(values | changes))  # pyright: ignore[reportArgumentType]


def all_patterns(space: SearchSpace, depth: int) -> list[tuple[Attention, ...]]:
    """List every legal pattern of a depth."""
    every = itertools.product(space.kinds, repeat=depth)
    return [kinds for kinds in every if space.make(256, 768, kinds) in space]


def costs(specs: Sequence[ArchSpec]) -> dict[str, np.ndarray]:
    """Compute known objectives: prefill with an interval, and sizes by real counts."""
    size = np.array([weight_bytes(spec, Quantization.int8da4w) for spec in specs]) / 2**20
    windows = [min(2048, spec.sliding_window) for spec in specs]
    cache = [
        kv_cache_bytes(spec, 2048, window, CacheFormat.fp32)
        for spec, window in zip(specs, windows, strict=True)
    ]
    return {
        "prefill_ms": latency(specs),
        "prefill_high_ms": 1.1 * latency(specs),
        "decode_ms": 1.0 + 0.01 * latency(specs),
        "size_mib": size,
        "memory_mib": size + np.array(cache) / 2**20,
    }


def make_problem(settings: SearchSettings | None = None) -> Problem:
    settings = settings or make_settings()
    objectives = settings.order(Objective.prefill)
    backbone = {key: float(values[0]) for key, values in costs([BACKBONE]).items()}
    backbone |= {"loss": loss(BACKBONE), TASK: errors(BACKBONE)[TASK].pct}
    return Problem(
        costs=costs,
        objectives=objectives,
        reference=settings.worst(objectives, backbone, settings.limits.given()),
        limits=settings.limits.given(),
    )


PROBLEM = make_problem()


def open_toy(
    storage: Path | str, space: SearchSpace, settings: SearchSettings | None = None, **parts: object
) -> Study:
    settings = settings or make_settings()
    return open_study(
        storage,
        "toy",
        {**space_fingerprint(space), **parts},
        objectives=settings.order(Objective.prefill),
        heartbeat_s=settings.heartbeat_s,
        retries=settings.retries,
    )


def run(
    storage: Path | str,
    space: SearchSpace | None = None,
    evaluate=None,
    seed=0,
    problem: Problem | None = None,
    **changes: object,
):
    """Search the toy space; return all trials."""
    space, settings = space or make_space(), make_settings(**changes)
    return search(
        open_toy(storage, space, settings),
        space,
        evaluate
        or (lambda spec, _, __: Quality(loss(spec), errors=errors(spec) if settings.tasks else {})),
        problem or make_problem(settings),
        settings,
        seed=seed,
    )


def work(storage: Path | str, log: Path, settings: dict[str, object]) -> None:
    """Run one worker, in its own process, that records the trials it starts."""

    def evaluate(spec: ArchSpec, number: int, watch: Watch) -> Quality:
        with log.open("a") as file:
            print(number, file=file)
        time.sleep(0.05)
        return Quality(loss(spec))

    run(storage, evaluate=evaluate, **settings)


if __name__ == "__main__":  # killed by a test

    def slow(spec: ArchSpec, number: int, watch: Watch) -> Quality:
        print(number, flush=True)
        time.sleep(0.05 if number < 9 else 3600)
        return Quality(loss(spec))

    with one_line_errors():
        run(Path(sys.argv[1]), evaluate=slow, sampler=Sampler.flash)
