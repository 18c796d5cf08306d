"""`delegated_symbols`: XNNPACK takes operators whose shapes are known only at run time.

XNNPACK reshapes its graph at every call and asks of a shape only that it is not empty. ExecuTorch's
partitioner cannot compute whether a shape is that holds a number out of a tensor, such as how many
keys there are, and so it refuses all of those. But the bounds of such a number may tell.
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
    """Let the partitioner accept shapes that are not empty by the bounds of their symbols."""
    from executorch.backends.xnnpack.partition.config import xnnpack_config

    with patch.object(xnnpack_config, "has_free_unbacked_symbols", _may_be_empty):
        yield


def _may_be_empty(value: Tensor) -> bool:
    if not has_free_unbacked_symbols(value):
        return False
    # Of four dimensions a later pass asks more than bounds can tell: whether they are an image.
    return value.dim() > 3 or not all(statically_known_true(size >= 1) for size in value.shape)
