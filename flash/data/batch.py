"""What a training or held-out batch is."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Batch(NamedTuple):
    """Packed sequences. A single sequence is a `Batch` too, without the first axis.

    Attributes:
        tokens: Token ids; the model reads all but the last and predicts all but the first.
        learn: Targets (`tokens[:, 1:]`) that count for the loss; None: all.
        documents: Number of the document that each input (`tokens[:, :-1]`) belongs to, for
            attention masks; None: sequences are attended to as a whole.
        place: Where in the stream each sequence ends, for resuming (`flash.data.stream`); None for
            data that is read by index.
        top_ids: The teacher's likeliest tokens in the place of each target; None: no teacher, or
            one that runs along.
        top_log_probs: Theirs, and last that of all others together (`TopLogProbs`) [nats].
    """

    tokens: Int[Tensor, "b s+1"]
    learn: Bool[Tensor, "b s"] | None = None
    documents: Int[Tensor, "b s"] | None = None
    place: Int[Tensor, "b place"] | None = None
    top_ids: Int[Tensor, "b s k"] | None = None
    top_log_probs: Float[Tensor, "b s k+1"] | None = None


def collate(sequences: Sequence[Batch]) -> Batch:
    """Sequences of one kind as a batch."""
    fields = (
        None if values[0] is None else torch.stack(values)
        for values in zip(*sequences, strict=True)
    )
    return Batch(*fields)  # pyright: ignore[reportArgumentType]


def document_numbers(tokens: Int[Tensor, " s+1"], end_of_text: int) -> Int[Tensor, " s"]:
    """Number of the document within the sequence, by input; end-of-text is its document's last."""
    ends = tokens[:-1] == end_of_text
    return ends.cumsum(0) - ends.long()
