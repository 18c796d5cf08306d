"""`delegated_symbols`: delegation to XNNPACK of operators whose shapes are known only at run time.

XNNPACK reshapes its graph at every call and requires of a shape only that it is not empty. A shape
may depend on a number that is read out of a tensor, such as the number of keys. ExecuTorch's
partitioner refuses all such shapes, since in general it cannot prove that they are not empty. Here
the bounds of the number often prove it, and the patch makes the partitioner look at these.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import (
    has_free_unbacked_symbols,
    statically_known_true,
)


@contextmanager
def delegated_symbols() -> Iterator[None]:
    """Let the partitioner accept shapes whose symbols' bounds prove that they are not empty."""
    from executorch.backends.xnnpack.partition.config import xnnpack_config

    with patch.object(xnnpack_config, "has_free_unbacked_symbols", _may_be_empty):
        yield


def _may_be_empty(value: Tensor) -> bool:
    if not has_free_unbacked_symbols(value):
        return False
    # Of four dimensions a later pass asks more than bounds can tell: whether they are an image.
    return value.dim() > 3 or not all(statically_known_true(size >= 1) for size in value.shape)
