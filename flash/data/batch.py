"""Batches of training and validation sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Batch(NamedTuple):
    """Packed sequences. A single sequence is a `Batch` too, without the first axis.

    Attributes:
        tokens: Token ids. The model reads all but the last and predicts all but the first.
        loss_mask: True for the targets (`tokens[:, 1:]`) that count for the loss. None: all count.
        document_ids: Number, within the sequence, of the document that each input
            (`tokens[:, :-1]`) belongs to, for attention masks. None: no masks between documents.
        stream_state: State of the stream after each sequence, to resume from
            (`flash.data.stream.LogicalShard`). None for data that are read by index.
        top_ids: The teacher's most likely tokens for each target. None: no teacher, or one that
            runs along with the training.
        top_log_probs: Their log probabilities and, last, the one of all other tokens together
            (`flash.model.losses.TopLogProbs`) [nats].
    """

    tokens: Int[Tensor, "b s+1"]
    loss_mask: Bool[Tensor, "b s"] | None = None
    document_ids: Int[Tensor, "b s"] | None = None
    stream_state: Int[Tensor, "b state"] | None = None
    top_ids: Int[Tensor, "b s k"] | None = None
    top_log_probs: Float[Tensor, "b s k+1"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        fields = (None if field is None else field.to(device) for field in self)
        return Batch(*fields)  # pyright: ignore[reportArgumentType]


def collate(sequences: Sequence[Batch]) -> Batch:
    """Stack sequences that have the same fields into a batch."""
    fields = (
        None if values[0] is None else torch.stack(values)
        for values in zip(*sequences, strict=True)
    )
    return Batch(*fields)  # pyright: ignore[reportArgumentType]


def document_ids_of(tokens: Int[Tensor, " s+1"], end_of_text: int) -> Int[Tensor, " s"]:
    """Number the documents of a sequence and return the number of each input token.

    An end-of-text token belongs to the document that it ends.
    """
    ends = tokens[:-1] == end_of_text
    return ends.cumsum(0) - ends.long()
