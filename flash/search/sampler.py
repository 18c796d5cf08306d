"""Stage 2 of the search: propose the candidates that should widen the frontier most.

Quality is learned by a Gaussian process from the trials so far; latency is the known function that
stage 1 left behind, so it is never modelled again. The acquisition is NEHVI (Sec. 3.5).
Candidates are only ever chosen from a pool of members of the space that obey all limits: nothing
is rounded or repaired.

A proposal is a pure function of (seed, trials so far, settings); hence a resumed search proposes
what an undisturbed one would.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence

import numpy as np
from botorch.exceptions.errors import ModelFittingError
from linear_operator.utils.errors import NanError, NotPSDError

from flash.arch import ArchSpec, Attention, SearchSpace
from flash.errors import InputError
from flash.search.acquisition import greedy_batch
from flash.search.baselines import ask_additive, ask_optuna
from flash.search.objectives import Problem, limited
from flash.search.pareto import non_dominated
from flash.search.proposal import Request
from flash.search.settings import Sampler, SearchSettings
from flash.search.study import Trial
from flash.search.surrogate import draw_losses

_log = logging.getLogger(__name__)

_DRAWN = 2048
"""Members drawn to see whether any obeys the limits."""
_DRY = 10
"""Rounds of draws without a new member after which the space counts as exhausted."""
_WALKERS = 64
"""Members that may be led to where the limits hold, each a matter of milliseconds."""
_STEPS = 64
"""Steps towards the limits that a member may take."""


def propose(
    space: SearchSpace,
    trials: Sequence[Trial],
    n: int,
    *,
    problem: Problem,
    settings: SearchSettings,
    seed: int,
) -> list[ArchSpec]:
    """Up to n architectures to evaluate next, none of them in `trials`; fewer when none are left.

    Trials that are still waiting or running count as points whose loss is yet to be drawn, so
    workers that ask while others train are sent elsewhere. Failed ones are only avoided.

    Args:
        space: Where candidates come from.
        trials: All trials so far.
        n: Candidates wanted.
        problem: Objectives, limits and reference point.
        settings: Sampler, sizes of the start-up design and of the pool.
        seed: Together with the number of trials it fixes every random choice.
    """
    rng = np.random.default_rng((seed, len(trials)))
    known = {trial.spec for trial in trials}
    complete = [trial for trial in trials if trial.complete]
    if not trials:
        # The largest member anchors the frontier's slow end, which no random draw would hit.
        first = [spec for spec in (largest(space),) if problem.excess([spec])[0] <= 0]
        fresh = _fresh(space, problem, rng, n, known)
        return list(itertools.islice(_unique([*first, *fresh]), n))
    if settings.sampler is Sampler.random or len({trial.loss for trial in complete}) < 2:
        return _fresh(space, problem, rng, n, known)  # a constant teaches nothing
    request = Request(
        space=space,
        problem=problem,
        settings=settings,
        trials=trials,
        n=n,
        seed=int(rng.integers(2**31)),
    )
    match settings.sampler:
        case Sampler.additive:
            chosen = ask_additive(request)
        case Sampler.nsga2 | Sampler.tpe:
            chosen = ask_optuna(request)
        case _:
            chosen = _ask_model(request, rng)
    taken = known | set(chosen)
    return [*chosen, *_fresh(space, problem, rng, n - len(chosen), taken)]


def _ask_model(request: Request, rng: np.random.Generator) -> list[ArchSpec]:
    """The n members of a pool with the greatest joint expected hypervolume improvement."""
    pool = _pool(request, rng)
    if len(pool) <= request.n:
        return pool
    others = [*request.pending, *pool]
    try:
        draws = draw_losses(request.space, request.specs, request.losses, others, request.seed)
    except (ModelFittingError, NotPSDError, NanError) as error:
        _log.warning("the loss model could not be fitted (%s); this batch is random", error)
        return []
    costs = request.problem.known([*request.specs, *others])
    first = len(request.specs) + len(request.pending)
    chosen = greedy_batch(draws, costs, first, request.n, request.problem.reference)
    return [pool[i - first] for i in chosen]


def _pool(request: Request, rng: np.random.Generator) -> list[ArchSpec]:
    """Different unknown specs: near the frontier one and two steps away, the rest drawn afresh."""
    space, problem, size = request.space, request.problem, request.settings.pool_size
    points = np.column_stack([request.losses, problem.known(request.specs)])
    parents = [s for s, keep in zip(request.specs, non_dominated(points), strict=True) if keep]
    near = _unique(spec for parent in parents for spec in space.neighbors(parent))
    near = _draw(rng, _legal(problem, [s for s in near if s not in request.known]), size // 2)
    # Expanding every neighbour would cost seconds; a few show the same directions.
    far = _unique(
        spec for parent in _draw(rng, near, 2 * len(parents)) for spec in space.neighbors(parent)
    )
    taken = request.known | set(near)
    far = _draw(rng, _legal(problem, [s for s in far if s not in taken]), size // 4)
    taken |= set(far)
    return near + far + _fresh(space, problem, rng, size - len(near) - len(far), taken)


def _fresh(
    space: SearchSpace, problem: Problem, rng: np.random.Generator, n: int, known: set[ArchSpec]
) -> list[ArchSpec]:
    """Up to n different stratified draws that are legal and not known; fewer when none are left.

    Where limits leave hardly any member, the draws that breach them least walk into the legal part.
    """
    found: dict[ArchSpec, None] = {}
    near: dict[ArchSpec, float] = {}
    dry = 0
    while len(found) < n and dry < _DRY:
        drawn = space.stratified(rng, max(n - len(found), 16))
        new = [spec for spec in drawn if spec not in known and spec not in found]
        excess = problem.excess(new)
        legal = [spec for spec, over in zip(new, excess, strict=True) if over <= 0]
        found.update(dict.fromkeys(legal[: n - len(found)]))
        near |= {s: float(over) for s, over in zip(new, excess, strict=True) if over > 0}
        dry = 0 if len(legal) > len(new) / 16 else dry + 1
    for spec in sorted(near, key=lambda spec: near[spec])[:_WALKERS]:
        if len(found) >= n:
            break
        reached = _walk(space, problem, rng, spec)
        if reached is not None and reached not in known:
            found[reached] = None
    return list(found)


def _walk(
    space: SearchSpace, problem: Problem, rng: np.random.Generator, spec: ArchSpec
) -> ArchSpec | None:
    """The first legal member on a path of steps that each lessen the breach; None where it ends."""
    excess = float(problem.excess([spec])[0])
    for _ in range(_STEPS):
        if excess <= 0:
            return spec
        steps = _draw(rng, list(space.neighbors(spec)), 32)
        over = problem.excess(steps)
        # The best of a few, not of all, so that walks end in different places.
        if not steps or over.min() >= excess:
            return None
        spec, excess = steps[int(over.argmin())], float(over.min())
    return None


def check_limits(space: SearchSpace, problem: Problem, seed: int) -> None:
    """See that some member obeys the limits, before any work starts.

    Raises:
        InputError: None was found; says by how much the best one misses.
    """
    if not problem.limits:
        return
    rng = np.random.default_rng(seed)
    drawn = [smallest(space), *space.stratified(rng, _DRAWN)]
    excess = problem.excess(drawn)
    best = drawn[int(excess.argmin())]
    if excess.min() <= 0 or _walk(space, problem, rng, best) is not None:
        return
    costs = {key: float(values[0]) for key, values in problem.costs([best]).items()}
    breaches = [
        f"{key}={limit:g} (the nearest of {len(drawn)} members, {best}, has "
        f"{limited(costs, key):.4g})"
        for key, limit in problem.limits.items()
        if limited(costs, key) > limit
    ]
    raise InputError(
        f"search.limits.{'; '.join(breaches)}: expected limits that some member of space "
        f"{space.settings.name} obeys; raise them or choose a space with smaller members"
    )


def largest(space: SearchSpace) -> ArchSpec:
    """The member with the greatest depth and widths, all of it full attention."""
    return space.make(
        space.model_dims[-1],
        space.ffn_dims[-1],
        (Attention.full_attention,) * space.depths[-1],
    )


def smallest(space: SearchSpace) -> ArchSpec:
    """A member with the least depth and widths and as many of the last, cheapest kind as may be."""
    longest, cheap = space.settings.max_efficient_run, space.kinds[-1]
    kinds = tuple(
        cheap if i % (longest + 1) < longest else Attention.full_attention
        for i in range(space.depths[0])
    )
    spec = space.make(space.model_dims[0], space.ffn_dims[0], kinds)
    full = (*kinds[:-1], Attention.full_attention)  # all skipped, where that is not allowed
    return spec if spec in space else spec.replace(layer_types=full)


def _legal(problem: Problem, specs: list[ArchSpec]) -> list[ArchSpec]:
    return [s for s, over in zip(specs, problem.excess(specs), strict=True) if over <= 0]


def _unique(specs: Iterable[ArchSpec]) -> list[ArchSpec]:
    return list(dict.fromkeys(specs))


def _draw(rng: np.random.Generator, specs: Sequence[ArchSpec], n: int) -> list[ArchSpec]:
    """Up to n of the specs at random."""
    return [specs[int(i)] for i in rng.permutation(len(specs))[:n]]
