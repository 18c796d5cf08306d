"""Baseline samplers: Optuna's NSGA-II and TPE, and an additive model that is maximized exactly.

Like the model-based sampler, each is a pure function of the seed and the trials so far.
"""

import heapq
import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from flash.arch import ArchSpec, Attention, SearchSpace, Variant
from flash.compat.optuna import generation_attrs
from flash.search.acquisition import greedy_batch
from flash.search.parameters import distributions, member, parameters
from flash.search.proposal import ProposalRequest
from flash.search.settings import Sampler

PATTERNS_PER_COUNT = 4
"""Patterns kept for each combination of layer counts; the best ones may be evaluated already."""
RIDGE = 1e-2
"""Weight of the ridge penalty on additive scores."""
_ASKS_PER_CANDIDATE = 64
"""Upper bound on asks for each requested candidate; the caller fills the rest at random."""


def ask_optuna(request: ProposalRequest) -> list[ArchSpec]:
    """Propose up to n members of the space with the Optuna sampler named by `settings.sampler`.

    The parameters are the depth, the widths, heads and vocabulary if there is a choice, and a kind
    of attention for every layer slot, with an FFN width if each layer has its own. Slots past the
    depth are ignored, and reported to Optuna as full attention of the last width. A suggestion that
    breaks a rule of the space, exceeds a limit or is known already is reported as a failed trial
    and costs only its own ask.
    """
    space, problem, settings = request.space, request.problem, request.settings
    size = max(settings.startup_trials, 4)
    every = distributions(space, space.depths[-1])
    costs = problem.known(request.specs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler: BaseSampler
        if settings.sampler is Sampler.nsga2:
            sampler = NSGAIISampler(population_size=size, seed=request.seed)
        else:
            sampler = TPESampler(
                multivariate=True, constant_liar=True, n_startup_trials=size, seed=request.seed
            )
        study = optuna.create_study(
            directions=[StudyDirection.MINIMIZE] * len(problem.objectives), sampler=sampler
        )
        for i, (spec, learned) in enumerate(zip(request.specs, request.values.T, strict=True)):
            study.add_trial(
                optuna.create_trial(
                    params=_params(space, spec),
                    distributions=every,
                    values=[*map(float, learned), *map(float, costs[i])],
                    # Trials run in order, so that this is how Optuna would have counted.
                    system_attrs=generation_attrs(i // size),
                )
            )
        found: dict[ArchSpec, None] = {}
        for _ in range(_ASKS_PER_CANDIDATE * request.n):
            trial = study.ask(every)
            spec = member(space, trial.params)
            fits = spec in space and spec not in request.known and spec not in found
            if fits and problem.violation([spec])[0] <= 0:
                found[spec] = None  # its trial stays running, so the next suggestions avoid it
                if len(found) == request.n:
                    break
            else:
                study.tell(trial, state=TrialState.FAIL)
    return list(found)


def _params(space: SearchSpace, spec: ArchSpec) -> dict[str, int | str]:
    """Return the parameters with every slot of the space; those past the depth play no part."""
    unused = (Attention.full_attention,) * (space.depths[-1] - spec.num_layers)
    widths = (*spec.ffn_dims, *(spec.ffn_dims[-1],) * len(unused))
    longest = spec.replace(layer_types=(*spec.layer_types, *unused), ffn_dim=widths)
    return {**parameters(space, longest), "num_layers": spec.num_layers}


class AdditiveScores:
    """Additive model of the log-loss: a score for each size and for each kind in each layer slot.

    FFN widths that differ by layer have a score per layer slot and unit of their logarithm.

    The scores are fitted to finished trials by ridge regression. Puzzletron instead measures the
    score of each block with the rest of the network intact; here all samplers learn from the same
    trials.

    Args:
        space: Search space, which defines the choices.
        specs: Evaluated architectures.
        losses: Their losses [nats a token].
    """

    def __init__(self, space: SearchSpace, specs: Sequence[ArchSpec], losses: ArrayLike) -> None:
        self._space = space
        logs = np.log(np.asarray(losses, dtype=float))
        rows = np.stack([self._row(spec) for spec in specs])
        self._center, self._mean = rows.mean(axis=0), float(logs.mean())
        rows = rows - self._center
        gram = rows.T @ rows + RIDGE * len(rows) * np.eye(rows.shape[1])
        self._scores = np.linalg.solve(gram, rows.T @ (logs - self._mean))

    def _row(self, spec: ArchSpec) -> NDArray[np.float64]:
        space = self._space
        slots = np.zeros((space.depths[-1], len(space.kinds)))
        for i, kind in enumerate(spec.layer_types):
            slots[i, space.kinds.index(kind)] = 1.0
        sizes = [
            [float(value == choice) for choice in choices]
            for value, choices in (
                (spec.num_layers, space.depths),
                (spec.model_dim, space.model_dims),
                (Variant.of(spec), space.variants),
            )
        ]
        return np.concatenate([*sizes, self._widths(spec), slots.ravel()])

    def _widths(self, spec: ArchSpec) -> NDArray[np.float64]:
        """Encode the FFN width: by its value or, if each layer has its own, by layer slot."""
        space = self._space
        if not space.per_layer:
            return np.array([float(spec.ffn_dims[0] == choice) for choice in space.ffn_dims])
        logs = np.zeros(space.depths[-1])
        logs[: spec.num_layers] = np.log(np.array(spec.ffn_dims) / space.ffn_dims[-1])
        return logs

    def predict(self, specs: Sequence[ArchSpec]) -> NDArray[np.float64]:
        """Predict the losses [nats a token] of `specs`, shape `(specs,)`."""
        rows = np.stack([self._row(spec) for spec in specs])
        return np.exp(self._mean + (rows - self._center) @ self._scores)

    def best_patterns(self, depth: int) -> list[tuple[Attention, ...]]:
        """Find the best patterns of `depth` layers by dynamic programming.

        The known objectives depend on a pattern only through its number of layers of each kind
        (flash.latency.cost_model). Keeping the best `PATTERNS_PER_COUNT` patterns for every
        combination of these counts therefore keeps the best predicted loss at any cost.
        """
        space = self._space
        slots = self._scores[-space.depths[-1] * len(space.kinds) :].reshape(-1, len(space.kinds))
        limit = space.settings.max_efficient_run
        # (current run of efficient layers, layers of each kind) -> best (sum of scores, kinds).
        states: dict[tuple[int, tuple[int, ...]], list[tuple[float, tuple[int, ...]]]]
        states = {(0, (0,) * len(space.kinds)): [(0.0, ())]}
        for slot in range(depth):
            grown: dict[tuple[int, tuple[int, ...]], list[tuple[float, tuple[int, ...]]]] = {}
            for (run, counts), sums in states.items():
                for k, kind in enumerate(space.kinds):
                    now = run + 1 if kind.efficient else 0
                    if now > limit:
                        continue
                    more = (*counts[:k], counts[k] + 1, *counts[k + 1 :])
                    grown.setdefault((now, more), []).extend(
                        (total + float(slots[slot, k]), (*kinds, k)) for total, kinds in sums
                    )
            states = {key: heapq.nsmallest(PATTERNS_PER_COUNT, sums) for key, sums in grown.items()}
        return [
            tuple(space.kinds[k] for k in kinds) for sums in states.values() for _, kinds in sums
        ]


def ask_additive(request: ProposalRequest) -> list[ArchSpec]:
    """Propose up to n members with the greatest improvement according to `AdditiveScores`.

    The patterns found by dynamic programming are crossed with all sizes; FFN widths that differ by
    layer are drawn. At most `pool_size` of these candidates, drawn at random, compete.
    """
    space, problem, size = request.space, request.problem, request.settings.pool_size
    scores = AdditiveScores(space, request.specs, request.values[0])
    patterns = [pattern for depth in space.depths for pattern in scores.best_patterns(depth)]
    choices = list(itertools.product(space.model_dims, space.ffn_dims, patterns, space.variants))
    rng = np.random.default_rng(request.seed)
    order = rng.permutation(len(choices))
    pool: list[ArchSpec] = []
    for start in range(0, len(order), size):
        drawn = (space.shaped(rng, *choices[int(i)]) for i in order[start : start + size])
        new = [spec for spec in drawn if spec in space and spec not in request.known]
        pool += [s for s, over in zip(new, problem.violation(new), strict=True) if over <= 0]
        if len(pool) >= size:
            break
    if not pool:
        return []
    both = [*request.specs, *pool]
    losses = np.concatenate([request.values[0], scores.predict(pool)])
    num_observed = len(request.specs)
    chosen = greedy_batch(
        losses[None, None], problem.known(both), num_observed, request.n, problem.reference
    )
    return [both[i] for i in chosen]
