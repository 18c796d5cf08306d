"""Attention masks, and the attention kernels that use them.

Shapes: b batch, s queries, k keys, h query heads, g key heads, d head size.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""Mask of one layer: a tensor `(s, k)` or `(b, 1, s, k)` that is true where a query may see a key,
or the same as blocks for flex attention."""


def visible(
    queries: Int[Tensor, " s"], keys: Int[Tensor, " k"], window: int | None
) -> Bool[Tensor, "s k"]:
    """Mask that is true where a query may see a key.

    Args:
        queries: Position of each query.
        keys: Position of each key.
        window: Positions that a query sees, its own included; None sees all earlier ones.
    """
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


@dataclass(frozen=True)
class MaskSpec:
    """Positions that the queries of one forward pass may see.

    No query sees the future. A mask for one kind of layer follows with the window of that kind.

    Attributes:
        past: Number of positions in the cache before the first query.
        length: Number of queries.
        documents: Document of each position, `(b, s)`; positions see their own document only. None
            for one document per sequence. Cannot be combined with a past.
        device: Device of the masks.
    """

    past: int
    length: int
    documents: Int[Tensor, "b s"] | None
    device: torch.device

    def mask(self, window: int | None) -> Mask | None:
        """The mask of layers with this window; None stands for plain causal attention.

        On a GPU the mask is a list of blocks, so that blocks of pairs which no query sees take no
        time. A mask of all pairs would take `b s^2` bytes, 64 MiB per sequence of 8192 tokens.
        """
        if window is None and self.past == 0 and self.documents is None:
            return None
        if self.device.type == "cuda" and self.past == 0:
            return self.block_mask(window)
        positions = torch.arange(self.past + self.length, device=self.device)
        mask = visible(positions[self.past :], positions, window)
        if self.documents is None:
            return mask
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (mask & same)[:, None]

    def block_mask(self, window: int | None) -> BlockMask:
        """The mask as blocks for flex attention; only without a past."""
        documents, length = self.documents, self.length

        def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = query >= key
            if window is not None:
                seen = seen & (query - key < window)
            if documents is not None:
                seen = seen & (documents[b, query] == documents[b, key])
            return seen

        batch = None if documents is None else len(documents)
        device = str(self.device)
        return create_block_mask(allowed, batch, None, length, length, device=device)


@cache
def _compiled_flex() -> object:
    return torch.compile(flex_attention)


def attend(
    q: Float[Tensor, "b h s d"],
    k: Float[Tensor, "b g k d"],
    v: Float[Tensor, "b g k d"],
    mask: Mask | None,
) -> Float[Tensor, "b h s d"]:
    """Scaled dot-product attention, in which each of g key heads serves h / g query heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Mask of the layer; None for causal attention over as many keys as queries.
    """
    grouped = k.shape[1] != q.shape[1]
    if isinstance(mask, BlockMask):
        # Flex attention that is not compiled computes and keeps the scores of all pairs.
        flex = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)  # pyright: ignore
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
