"""PyTorch: bounds of symbols in an export, caches of fake tensors, products with many tensors.

Names that PyTorch 2.13 does not export, and the reasons to use them:

- `torch._check`: tells `torch.export` the bounds of a number that is known only at run time.
- `torch._foreach_mul_`: one kernel for all gradients instead of one each.
- `torch._subclasses.FakeTensorMode.cache_clear` and `ShapeEnv.fake_tensor_cache`: caches that would
  keep all weights of every lowered model for the life of the process.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # training needs no exporter
    from torch.export import ExportedProgram


def assume(condition: bool) -> None:
    """Have an export rely on a condition of symbolic numbers; in eager mode, check it."""
    torch._check(condition)


def scale_in_place(tensors: Sequence[Tensor | None], factor: float) -> None:
    """Multiply all tensors with one factor."""
    torch._foreach_mul_(tensors, factor)  # pyright: ignore  the stubs know one overload


def clear_fake_tensor_caches(programs: "Iterable[ExportedProgram]") -> None:
    """Empty the caches of fake tensors: the process-wide one, and that of each program's shapes.

    Their keys hold the delegates of lowered programs, and so the weights.
    """
    from torch._subclasses import FakeTensorMode

    FakeTensorMode.cache_clear()
    for program in programs:
        for node in program.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.fake_tensor_cache.clear()
