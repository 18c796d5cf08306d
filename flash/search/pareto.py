"""Pareto tools. All objectives are minimised; rows are points. BoTorch does the arithmetic."""

from collections.abc import Sequence

import numpy as np
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Mask of the points that no other point beats; of equal points only the first stays.

    Args:
        points: Shape `(n, objectives)`.
    """
    values = np.asarray(points, dtype=float)
    if len(values) == 0:
        return np.zeros(0, dtype=bool)
    return is_non_dominated(-torch.from_numpy(values)).numpy()


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the points dominate, up to `reference`; points beyond it add nothing.

    Args:
        points: Shape `(n, objectives)`.
        reference: The worst acceptable value of every objective.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(reference))
    if len(reference) == 1:
        return max(0.0, reference[0] - float(values.min(initial=reference[0])))
    front = values[non_dominated(values)]
    # BoTorch maximises, hence the signs.
    volume = Hypervolume(ref_point=-torch.tensor(reference, dtype=torch.double))
    return float(volume.compute(-torch.from_numpy(front)))


def choose_winners(points: ArrayLike, reference: Sequence[float], k: int) -> list[int]:
    """Indices of up to k points that together dominate the most, greedily; the best one first.

    The first is the knee and each further one fills the widest gap that is left, so winners spread
    over the frontier without a rule on spacing. Fewer than k come back when no other point adds
    volume: a point beyond `reference` is not acceptable, so it cannot win.
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(reference))
    candidates = [int(i) for i in np.flatnonzero(non_dominated(values))]
    chosen: list[int] = []
    volume = 0.0
    while candidates and len(chosen) < k:
        volumes = [hypervolume(values[[*chosen, i]], reference) for i in candidates]
        best = int(np.argmax(volumes))
        if volumes[best] <= volume:
            break
        volume = volumes[best]
        chosen.append(candidates.pop(best))
    return chosen
