"""Pareto dominance and hypervolume by BoTorch. All objectives are minimized; rows are points."""

from collections.abc import Sequence

import numpy as np
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return a mask of the non-dominated points; of equal points only the first is kept.

    Args:
        points: Shape `(n, objectives)`.
    """
    values = np.asarray(points, dtype=float)
    if len(values) == 0:
        return np.zeros(0, dtype=bool)
    return is_non_dominated(-torch.from_numpy(values)).numpy()


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Compute the volume dominated by the points up to `reference`; points beyond it add none.

    Args:
        points: Shape `(n, objectives)`.
        reference: Worst acceptable value of each objective.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(reference))
    if len(reference) == 1:
        return max(0.0, reference[0] - float(values.min(initial=reference[0])))
    front = values[non_dominated(values)]
    # BoTorch maximizes, hence the signs.
    volume = Hypervolume(ref_point=-torch.tensor(reference, dtype=torch.double))
    return float(volume.compute(-torch.from_numpy(front)))


def choose_winners(
    points: ArrayLike, reference: Sequence[float], k: int, distances: ArrayLike = 1.0
) -> list[int]:
    """Select up to k points greedily by the hypervolume that each adds; the best one comes first.

    The first point is the knee of the frontier and each further one fills the widest remaining gap,
    so winners spread over the frontier without a rule on spacing. The volume is weighted by the
    distance to the nearest winner so far, so that of two points in a gap the less similar one wins.
    Points beyond `reference` add no volume and are never selected.

    Args:
        points: Shape `(n, objectives)`.
        reference: Worst acceptable value of each objective.
        k: Greatest number of winners.
        distances: Distances between what the points stand for, shape `(n, n)`; all are equal by
            default.

    Returns:
        Indices of the points; fewer than k when no other point adds volume.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(reference))
    weights = np.broadcast_to(np.asarray(distances, dtype=float), (len(values), len(values)))
    candidates = [int(i) for i in np.flatnonzero(non_dominated(values))]
    chosen: list[int] = []
    volume = 0.0
    while candidates and len(chosen) < k:
        volumes = np.array([hypervolume(values[[*chosen, i]], reference) for i in candidates])
        nearest = weights[np.ix_(candidates, chosen)].min(axis=1, initial=1.0)
        best = int(np.argmax((volumes - volume) * nearest))
        if volumes[best] <= volume:
            break
        volume = float(volumes[best])
        chosen.append(candidates.pop(best))
    return chosen
