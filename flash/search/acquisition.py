"""Batch selection by noisy expected hypervolume improvement, with few uncertain objectives.

The loss is uncertain; the other objectives, the costs, are known. For one draw of the losses, the
lowest loss available at costs of at most c is a step function L(c). A candidate with costs c' and
loss l adds a volume equal to the integral of max(0, L(c) - l) over all c between c' and the
reference point. With one cost this integral is an exact sum over the steps of L. With several costs
it is estimated as a mean over fixed points of the box of costs. BoTorch's general qNEHVI
(arXiv:2105.08195) needs a box decomposition for each draw and, since 0.18, compiles C++ on first
use behind a lock that a killed process leaves behind.

A further uncertain objective, such as the error in a task, is a cost that each draw has anew.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

BOX_POINTS = 512
"""Quasi-random points that sample the box of costs when there are several costs."""


def greedy_batch(
    draws: NDArray[np.float64],
    costs: NDArray[np.float64],
    num_observed: int,
    n: int,
    reference: tuple[float, ...],
) -> list[int]:
    """Select the n points with the greatest joint expected improvement, best first.

    The batch grows greedily: each further point is scored by the improvement that it adds to the
    points chosen before it.

    Args:
        draws: Joint posterior draws of the uncertain objectives, shape `(uncertain, draws,
            points)`. Observed points come first (they are noisy, so they are drawn too), then the
            pool.
        costs: Known objectives of every point, shape `(points, known)`.
        num_observed: Number of points that are observed or already being evaluated.
        n: Number of points to select.
        reference: Worst acceptable (*uncertain, *known).

    Returns:
        Indices into the points; fewer than n if the pool is smaller.
    """
    worst = np.asarray(reference[1:], dtype=float)
    heights, others = draws[0], draws[1:]
    pool = np.arange(num_observed, heights.shape[1])
    n = min(n, len(pool))
    if len(others) == 0 and costs.shape[1] == 1:
        first, only = reference[0], float(worst[0])
        return _greedy_one_cost(heights, costs[:, 0], num_observed, n, first, only)
    # No point lies below the least costs, so the box begins there.
    low = np.minimum([*others.min(axis=(1, 2), initial=np.inf), *costs.min(axis=0)], worst)
    count = BOX_POINTS if len(worst) else 1
    unit = qmc.Sobol(max(len(worst), 1), scramble=False).random(count)[:, : len(worst)]
    box = low + (worst - low) * (unit + 0.5 / count)
    known = np.all(costs[:, None] <= box[None, :, len(others) :], axis=2)  # (points, box points)
    below = [known] * len(heights)  # for each draw
    if len(others) > 0:
        below = [
            known & np.all(each.T[:, None] <= box[None, :, : len(others)], axis=2)
            for each in others.swapaxes(0, 1)
        ]
    stairs = np.full((len(heights), count), float(reference[0]))
    for i in range(num_observed):
        _lower(stairs, heights, below, i)
    chosen: list[int] = []
    for _ in range(n):
        gain = np.zeros(len(pool))
        for draw, stair, reached in zip(heights, stairs, below, strict=True):
            gain += ((stair - draw[pool, None]).clip(min=0) * reached[pool]).sum(axis=1)
        best = int(gain.argmax())
        chosen.append(int(pool[best]))
        _lower(stairs, heights, below, chosen[-1])
        pool = np.delete(pool, best)
    return chosen


def _lower(
    stairs: NDArray[np.float64],
    heights: NDArray[np.float64],
    below: list[NDArray[np.bool_]],
    point: int,
) -> None:
    """Lower the step function of each draw to a point, where its costs are reached."""
    for draw, stair, reached in zip(heights, stairs, below, strict=True):
        stair[reached[point]] = np.minimum(stair[reached[point]], draw[point])


def _greedy_one_cost(
    draws: NDArray[np.float64],
    costs: NDArray[np.float64],
    num_observed: int,
    n: int,
    worst_loss: float,
    worst_cost: float,
) -> list[int]:
    """Compute `greedy_batch` exactly for a single known objective."""
    chosen: list[int] = []
    pool = np.arange(num_observed, draws.shape[1])
    for _ in range(n):
        known = np.array([*range(num_observed), *chosen], dtype=int)
        known = known[np.argsort(costs[known], kind="stable")]
        starts = np.minimum(costs[known], worst_cost)
        # Step j of L spans starts[j]..starts[j + 1]; before the first start L is the worst loss.
        edges = np.concatenate([[-np.inf], starts, [worst_cost]])
        steps = np.minimum.accumulate(
            np.column_stack([np.full(len(draws), worst_loss), draws[:, known]]), axis=1
        )
        gain = np.zeros(len(pool))
        for j in range(steps.shape[1]):
            widths = (edges[j + 1] - np.maximum(edges[j], costs[pool])).clip(min=0)
            right = widths > 0
            heights = (steps[:, j, None] - draws[:, pool[right]]).clip(min=0)
            gain[right] += widths[right] * heights.mean(axis=0)
        best = int(gain.argmax())
        chosen.append(int(pool[best]))
        pool = np.delete(pool, best)
    return chosen
