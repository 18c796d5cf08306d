"""Proposal of candidates by Bayesian optimization with noisy expected hypervolume improvement.

A Gaussian process learns the loss from the trials so far, and another the error in each task that
is an objective. Latency is a known function, fitted in stage 1, so it is not modeled again. The
acquisition function is NEHVI (Sec. 3.5). Candidates are selected from a pool of members of the
space that are within all limits; nothing is rounded or repaired.

A proposal is a pure function of the seed, the trials so far and the settings. A resumed search
therefore makes the same proposals as an uninterrupted one.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence

import numpy as np
from botorch.exceptions.errors import ModelFittingError
from linear_operator.utils.errors import NanError, NotPSDError
from numpy.typing import NDArray

from flash.arch import ArchSpec, Attention, SearchSpace
from flash.errors import InputError
from flash.search.acquisition import greedy_batch
from flash.search.baselines import ask_additive, ask_optuna
from flash.search.objectives import Objective, Problem, limit_name, limited_value
from flash.search.pareto import non_dominated
from flash.search.proposal import ProposalRequest
from flash.search.settings import Sampler, SearchSettings
from flash.search.surrogate import Observations, draw_values
from flash.search.trial import Trial

_log = logging.getLogger(__name__)

_NUM_PROBES = 2048
"""Members drawn to check that the limits can be met."""
_MOST_LEARNED = 1024
"""Most trials that the surrogate learns from; a fit takes 10 s then, and grows with the cube."""
_MAX_EMPTY_ROUNDS = 10
"""Consecutive rounds with few new members after which drawing ends."""
_MAX_WALKS = 64
"""Walks towards the feasible part of the space; each takes milliseconds."""
_MAX_WALK_STEPS = 64
"""Greatest number of steps of one walk."""


def propose(
    space: SearchSpace,
    trials: Sequence[Trial],
    n: int,
    *,
    problem: Problem,
    settings: SearchSettings,
    seed: int,
) -> list[ArchSpec]:
    """Propose up to n architectures to evaluate next, none of which is in `trials`.

    Waiting and running trials enter the acquisition with posterior draws of their losses, so
    concurrent workers receive different candidates. Failed trials are excluded only.

    Args:
        space: Search space.
        trials: All trials so far.
        n: Number of candidates to propose.
        problem: Objectives, limits and reference point.
        settings: Sampler, sizes of the start-up design and of the pool.
        seed: Seed that fixes, with the number of trials, every random choice.

    Returns:
        Distinct candidates; fewer than n when no further member can be found.
    """
    rng = np.random.default_rng((seed, len(trials)))
    known = {trial.spec for trial in trials}
    if not trials:
        # The largest member anchors the slow end of the frontier; a random draw would miss it.
        first = [spec for spec in (largest(space),) if problem.violation([spec])[0] <= 0]
        fresh = _fresh(space, problem, rng, n, known)
        return list(itertools.islice(_unique([*first, *fresh]), n))
    seen = {trial.learned(problem.learned) for trial in trials if trial.complete}
    if settings.sampler is Sampler.random or len(seen) < 2:
        return _fresh(space, problem, rng, n, known)  # nothing can be learned from equal trials
    request = ProposalRequest(
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
            chosen = _ask_surrogate(request, rng)
    taken = known | set(chosen)
    return [*chosen, *_fresh(space, problem, rng, n - len(chosen), taken)]


def _ask_surrogate(request: ProposalRequest, rng: np.random.Generator) -> list[ArchSpec]:
    """Select the n pool members with the greatest joint expected hypervolume improvement."""
    pool = _pool(request, rng)
    if len(pool) <= request.n:
        return pool
    others = [*request.pending, *pool]
    learned = _learned(request, rng)
    specs = [request.specs[i] for i in learned]
    try:
        draws = draw_values(
            request.space, specs, _observations(request, learned), others, request.seed
        )
    except (ModelFittingError, NotPSDError, NanError) as error:
        _log.warning("the surrogate model could not be fitted (%s); this batch is random", error)
        return []
    costs = request.problem.known([*specs, *others])
    first = len(specs) + len(request.pending)
    chosen = greedy_batch(draws, costs, first, request.n, request.problem.reference)
    return [pool[i - first] for i in chosen]


def _observations(request: ProposalRequest, indices: Sequence[int]) -> list[Observations]:
    """Return what the surrogate learns of each objective that training decides."""
    found = []
    for i, objective in enumerate(request.problem.learned):
        noise = request.noise(i)
        found.append(
            Observations(
                request.values[i, indices],
                None if noise is None else noise[indices],
                logarithmic=objective == Objective.quality,
            )
        )
    return found


def _learned(request: ProposalRequest, rng: np.random.Generator) -> list[int]:
    """Indices of the trials to learn from: all or, of very many, the frontier and a random rest."""
    indices = range(len(request.specs))
    if len(indices) <= _MOST_LEARNED:
        return [*indices]
    front = [i for i, keep in zip(indices, _on_frontier(request), strict=True) if keep]
    rest = np.setdiff1d(indices, front)
    count = max(0, _MOST_LEARNED - len(front))
    return sorted([*front, *rng.choice(rest, count, replace=False).tolist()])


def _on_frontier(request: ProposalRequest) -> NDArray[np.bool_]:
    """Tell for each rated spec whether no other is better in all objectives."""
    return non_dominated(np.column_stack([request.values.T, request.problem.known(request.specs)]))


def _pool(request: ProposalRequest, rng: np.random.Generator) -> list[ArchSpec]:
    """Collect distinct new specs: one and two steps from the frontier, the rest drawn at random."""
    space, problem, size = request.space, request.problem, request.settings.pool_size
    parents = [s for s, keep in zip(request.specs, _on_frontier(request), strict=True) if keep]
    near = _unique(spec for parent in parents for spec in space.neighbors(parent))
    near = _draw(rng, _feasible(problem, [s for s in near if s not in request.known]), size // 2)
    # Expanding every neighbor would take seconds; a sample covers the same directions.
    far = _unique(
        spec for parent in _draw(rng, near, 2 * len(parents)) for spec in space.neighbors(parent)
    )
    taken = request.known | set(near)
    far = _draw(rng, _feasible(problem, [s for s in far if s not in taken]), size // 4)
    taken |= set(far)
    return near + far + _fresh(space, problem, rng, size - len(near) - len(far), taken)


def _fresh(
    space: SearchSpace, problem: Problem, rng: np.random.Generator, n: int, known: set[ArchSpec]
) -> list[ArchSpec]:
    """Draw up to n distinct feasible specs that are not known, stratified; fewer if exhausted.

    If few draws are feasible, those with the least violations walk to the feasible part.
    """
    found: dict[ArchSpec, None] = {}
    near: dict[ArchSpec, float] = {}
    empty_rounds = 0
    while len(found) < n and empty_rounds < _MAX_EMPTY_ROUNDS:
        drawn = space.stratified(rng, max(n - len(found), 16))
        new = [spec for spec in drawn if spec not in known and spec not in found]
        violation = problem.violation(new)
        feasible = [spec for spec, over in zip(new, violation, strict=True) if over <= 0]
        found.update(dict.fromkeys(feasible[: n - len(found)]))
        near |= {s: float(over) for s, over in zip(new, violation, strict=True) if over > 0}
        empty_rounds = 0 if len(feasible) > len(new) / 16 else empty_rounds + 1
    for spec in sorted(near, key=lambda spec: near[spec])[:_MAX_WALKS]:
        if len(found) >= n:
            break
        reached = _walk(space, problem, rng, spec)
        if reached is not None and reached not in known:
            found[reached] = None
    return list(found)


def _walk(
    space: SearchSpace, problem: Problem, rng: np.random.Generator, spec: ArchSpec
) -> ArchSpec | None:
    """Walk to a feasible member in steps that reduce the violation; None if the walk gets stuck."""
    violation = float(problem.violation([spec])[0])
    for _ in range(_MAX_WALK_STEPS):
        if violation <= 0:
            return spec
        steps = _draw(rng, list(space.neighbors(spec)), 32)
        over = problem.violation(steps)
        # Comparing a sample of the steps, not all, makes walks end in different places.
        if not steps or over.min() >= violation:
            return None
        spec, violation = steps[int(over.argmin())], float(over.min())
    return None


def check_limits(space: SearchSpace, problem: Problem, seed: int) -> None:
    """Check, before any work starts, that some member of the space is within the limits.

    Raises:
        InputError: No member was found; the message gives the values of the nearest one.
    """
    if not problem.limits:
        return
    rng = np.random.default_rng(seed)
    drawn = [smallest(space), *space.stratified(rng, _NUM_PROBES)]
    violation = problem.violation(drawn)
    best = drawn[int(violation.argmin())]
    if violation.min() <= 0 or _walk(space, problem, rng, best) is not None:
        return
    costs = {key: float(values[0]) for key, values in problem.costs([best]).items()}
    breaches = [
        f"{limit_name(key)}={limit:g} (the nearest of {len(drawn)} members, {best}, has "
        f"{limited_value(costs, key):.4g})"
        for key, limit in problem.limits.items()
        if limited_value(costs, key) > limit
    ]
    raise InputError(
        f"{'; '.join(breaches)}: expected limits that some member of space "
        f"{space.settings.name} obeys; raise them or choose a space with smaller members"
    )


def largest(space: SearchSpace) -> ArchSpec:
    """Return the member with the greatest sizes and full attention in every layer."""
    return space.make(
        space.model_dims[-1],
        space.ffn_dims[-1],
        (Attention.full_attention,) * space.depths[-1],
        space.variants[-1],
    )


def smallest(space: SearchSpace) -> ArchSpec:
    """Return a member with the least sizes and the most layers of the cheapest kind."""
    longest, cheap = space.settings.max_efficient_run, space.kinds[-1]
    kinds = tuple(
        cheap if i % (longest + 1) < longest else Attention.full_attention
        for i in range(space.depths[0])
    )
    spec = space.make(space.model_dims[0], space.ffn_dims[0], kinds, space.variants[0])
    full = (*kinds[:-1], Attention.full_attention)  # if skipping all layers is not allowed
    return spec if spec in space else spec.replace(layer_types=full)


def _feasible(problem: Problem, specs: list[ArchSpec]) -> list[ArchSpec]:
    return [s for s, over in zip(specs, problem.violation(specs), strict=True) if over <= 0]


def _unique(specs: Iterable[ArchSpec]) -> list[ArchSpec]:
    return list(dict.fromkeys(specs))


def _draw(rng: np.random.Generator, specs: Sequence[ArchSpec], n: int) -> list[ArchSpec]:
    """Draw up to n of the specs without replacement."""
    return [specs[int(i)] for i in rng.permutation(len(specs))[:n]]
