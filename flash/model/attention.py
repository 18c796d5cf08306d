"""Which positions see which, and the attention kernel that heeds it.

Shapes: b batch, s queries, k keys, h heads, d head size.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""`(s, k)` or `(b, 1, s, k)`, true where a query may see a key; or the same for flex attention."""


def visible(
    queries: Int[Tensor, " s"], keys: Int[Tensor, " k"], window: int | None
) -> Bool[Tensor, "s k"]:
    """True where a query position may see a key position."""
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


@dataclass(frozen=True)
class Reach:
    """What one call's queries may look at, besides the rule that nothing sees the future.

    Attributes:
        past: Positions in the cache before the first query.
        length: Queries.
        documents: Document of each position `(b, s)`, which sees no other; None: all are one. Not
            together with a past.
        device: Where masks are made.
    """

    past: int
    length: int
    documents: Int[Tensor, "b s"] | None
    device: torch.device

    def mask(self, window: int | None) -> Mask | None:
        """The mask of layers with this window; None where plain causal attention is meant.

        On a GPU a mask is a list of blocks, so that what no query sees costs nothing; there, a mask
        of all pairs would also take `b s^2` bytes, 64 MiB a sequence of 8192 tokens.
        """
        if window is None and self.past == 0 and self.documents is None:
            return None
        if self.device.type == "cuda" and self.past == 0:
            return self.blocks(window)
        positions = torch.arange(self.past + self.length, device=self.device)
        mask = visible(positions[self.past :], positions, window)
        if self.documents is None:
            return mask
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (mask & same)[:, None]

    def blocks(self, window: int | None) -> BlockMask:
        """The same for flex attention."""
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
    """Scaled dot-product attention; g key heads serve h query heads."""
    grouped = k.shape[1] != q.shape[1]
    if isinstance(mask, BlockMask):
        # Uncompiled, flex attention computes and keeps every pair.
        flex = _compiled_flex() if q.device.type == "cuda" else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)  # pyright: ignore
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
