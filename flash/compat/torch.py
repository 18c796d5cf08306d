"""PyTorch: bounds of symbolic sizes in an export, caches of fake tensors, scaling of many tensors.

Names that PyTorch 2.13 does not export, and the reasons to use them:

- `torch._check`: declares bounds of a number that is known only at run time to `torch.export`.
- `torch._foreach_mul_`: scales all gradients with one kernel instead of one kernel each.
- `torch._subclasses.FakeTensorMode.cache_clear` and `ShapeEnv.fake_tensor_cache`: caches that would
  otherwise keep the weights of every lowered model until the process ends.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # training needs no exporter
    from torch.export import ExportedProgram


def assume(condition: bool) -> None:
    """Declare a condition on symbolic numbers to an export; check it in eager mode."""
    torch._check(condition)


def scale_in_place(tensors: Sequence[Tensor | None], factor: float) -> None:
    """Multiply all tensors in place by `factor`."""
    torch._foreach_mul_(tensors, factor)  # pyright: ignore  the stubs know one overload


def clear_fake_tensor_caches(programs: "Iterable[ExportedProgram]") -> None:
    """Empty the global cache of fake tensors and those of the programs' shape environments.

    Their keys hold the delegates of lowered programs, and thus the weights.
    """
    from torch._subclasses import FakeTensorMode

    FakeTensorMode.cache_clear()
    for program in programs:
        for node in program.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.fake_tensor_cache.clear()
