"""A small space with a known quality and latency, and a search on it that can be killed."""

import sys
import time
from pathlib import Path

import numpy as np

from flash.arch import ArchSpec, Attention, Choices, SearchSpace, SpaceSettings
from flash.search import Quality, Sampler, SearchSettings, Study, open_study, search
from flash.search.study import space_fingerprint

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
        ffn_dim=Choices(min=256, max=768, step=64),
    )
    return SearchSpace(settings, BACKBONE)


def loss(spec: ArchSpec) -> float:
    """Falls with every size; attention helps most early, sliding nearly as much late."""
    weights = np.exp(-np.linspace(0.0, 2.0, spec.num_layers))
    harm = {"F": 0.0, "S": 0.3, "-": 1.0}
    missing = weights @ [harm[letter] for letter in spec.pattern] / weights.sum()
    sizes = 8 * spec.model_dim**-0.5 + 6 * spec.ffn_dim**-0.5 + 3 / spec.num_layers
    return float(2.0 + sizes + 0.8 * missing + 0.05 * spec.longest_efficient_run)


def latency(specs: list[ArchSpec]) -> np.ndarray:
    cost = {"F": 4.0, "S": 3.6, "-": 0.0}
    rows = [
        sum(cost[letter] for letter in spec.pattern) * spec.model_dim / 256
        + spec.num_layers * spec.model_dim * spec.ffn_dim / 20000
        for spec in specs
    ]
    return np.array(rows)


def make_settings(**changes: object) -> SearchSettings:
    values = {"study": "toy", "trials": 20, "batch": 4, "startup_trials": 8, "pool_size": 128}
    return SearchSettings(**(values | changes))  # pyright: ignore[reportArgumentType]


REFERENCE = (loss(BACKBONE) + 1.0, float(latency([BACKBONE])[0]))


def open_toy(path: Path, space: SearchSpace, **parts: object) -> Study:
    return open_study(path, "toy", {**space_fingerprint(space), **parts})


def run(path: Path, space: SearchSpace | None = None, evaluate=None, seed=0, **changes: object):
    """Search the toy space; returns all trials."""
    space = space or make_space()
    return search(
        open_toy(path, space),
        space,
        evaluate or (lambda spec, number: Quality(loss(spec))),
        latency,
        make_settings(**changes),
        reference=REFERENCE,
        seed=seed,
    )


if __name__ == "__main__":  # killed by a test

    def slow(spec: ArchSpec, number: int) -> Quality:
        print(number, flush=True)
        time.sleep(0.05 if number < 9 else 3600)
        return Quality(loss(spec))

    run(Path(sys.argv[1]), evaluate=slow, sampler=Sampler.flash)
