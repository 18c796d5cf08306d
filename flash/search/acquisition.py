"""Which members of a pool should widen the frontier most: noisy expected hypervolume improvement.

One objective, the loss, is uncertain; the others are known figures. For one draw of the losses the
best loss that is to be had at costs of at most c is a known function of c, the staircase L(c), and
the volume that a candidate of costs c' and loss l adds is the integral of max(0, L(c) - l) over all
c between c' and the reference. With one cost that is a sum over the steps, exact; with more, a mean
over fixed points of the box of costs. BoTorch's general qNEHVI (arXiv:2105.08195) needs a box
decomposition for each draw and, since 0.18, compiles C++ on first use behind a lock that a killed
process leaves behind.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

BOX_POINTS = 512
"""Points at which the box of costs is looked at when there are several."""


def greedy_batch(
    draws: NDArray[np.float64],
    costs: NDArray[np.float64],
    num_observed: int,
    n: int,
    reference: tuple[float, ...],
) -> list[int]:
    """Indices of the n points with the greatest joint expected improvement, best first.

    The batch grows greedily: each further point's improvement is that beyond the chosen ones.

    Args:
        draws: Joint posterior draws of the loss, shape `(draws, points)`: observed points, which
            are noisy and hence drawn too, then the pool.
        costs: The known objectives of every point, shape `(points, objectives - 1)`.
        num_observed: How many of the points are observed, or already being evaluated.
        n: Points wanted.
        reference: Worst acceptable (loss, *costs).
    """
    worst = np.asarray(reference[1:], dtype=float)
    pool = np.arange(num_observed, draws.shape[1])
    n = min(n, len(pool))
    if costs.shape[1] == 1:
        return _along_a_line(draws, costs[:, 0], num_observed, n, reference[0], float(worst[0]))
    # Nothing is to be had below the least costs, so the box begins there.
    low = np.minimum(costs.min(axis=0), worst)
    count = BOX_POINTS if len(worst) else 1
    unit = qmc.Sobol(max(len(worst), 1), scramble=False).random(count)[:, : len(worst)]
    box = low + (worst - low) * (unit + 0.5 / count)
    below = np.all(costs[:, None] <= box[None], axis=2)  # (points, box points)
    stairs = np.full((len(draws), count), float(reference[0]))
    for i in range(num_observed):
        stairs[:, below[i]] = np.minimum(stairs[:, below[i]], draws[:, i, None])
    chosen: list[int] = []
    for _ in range(n):
        gain = np.zeros(len(pool))
        for draw, stair in zip(draws, stairs, strict=True):
            gain += ((stair - draw[pool, None]).clip(min=0) * below[pool]).sum(axis=1)
        best = int(gain.argmax())
        point = int(pool[best])
        chosen.append(point)
        stairs[:, below[point]] = np.minimum(stairs[:, below[point]], draws[:, point, None])
        pool = np.delete(pool, best)
    return chosen


def _along_a_line(
    draws: NDArray[np.float64],
    costs: NDArray[np.float64],
    num_observed: int,
    n: int,
    worst_loss: float,
    worst_cost: float,
) -> list[int]:
    """`greedy_batch` for one known objective."""
    chosen: list[int] = []
    pool = np.arange(num_observed, draws.shape[1])
    for _ in range(n):
        known = np.array([*range(num_observed), *chosen], dtype=int)
        known = known[np.argsort(costs[known], kind="stable")]
        starts = np.minimum(costs[known], worst_cost)
        # Step j of the staircase spans starts[j]..starts[j + 1]; before the first, all is open.
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
