"""Which sequences a rank gets, and when: the same whatever the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flash.errors import InputError


@dataclass(frozen=True)
class Share:
    """What one rank takes of every global batch.

    Sequences are numbered through the whole run; step n learns from numbers n * batch_size to
    (n + 1) * batch_size - 1, and rank r of W has those with number % W == r, in this order, cut
    into `accumulation` micro-batches.

    Attributes:
        batch_size: Sequences an optimiser step, over all ranks.
        world_size: Ranks.
        rank: This one.
        accumulation: Micro-batches a step.

    Raises:
        InputError: The global batch is no multiple of ranks x accumulation.
    """

    batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulation):
            raise InputError(
                f"recipe.batch_size={self.batch_size}: expected a multiple of {self.world_size} "
                f"ranks (trainer.devices) x {self.accumulation} micro-batches "
                "(trainer.micro_batch); change one of the three"
            )

    @property
    def micro_batch(self) -> int:
        """Sequences of this rank at a time."""
        return self.batch_size // (self.world_size * self.accumulation)

    def first(self, steps: int) -> int:
        """How many sequences this rank has had after so many steps."""
        return steps * self.batch_size // self.world_size


class ResumableBatches:
    """Endless micro-batches of dataset indices; the n-th depends on seed, share and n alone.

    Each epoch is a permutation of its own and begins where the one before ends, also within a
    batch, so that an epoch has every sequence exactly once.

    Args:
        num_sequences: Size of the dataset; at least the batch size.
        share: Of this rank.
        seed: Decides every permutation.
        start: Optimiser steps to skip.
    """

    def __init__(self, num_sequences: int, share: Share, seed: int, start: int = 0) -> None:
        if num_sequences < share.batch_size:
            raise InputError(
                f"recipe.batch_size={share.batch_size}: expected at most {num_sequences}, "
                "the number of sequences in the corpus"
            )
        self.num_sequences, self.share = num_sequences, share
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[int]]:
        share, first = self.share, self.share.first(self.start)
        orders: dict[int, np.ndarray] = {}
        while True:
            local = np.arange(first, first + share.micro_batch)
            epochs, within = np.divmod(share.rank + local * share.world_size, self.num_sequences)
            orders = {
                epoch: orders[epoch] if epoch in orders else self._order(epoch)
                for epoch in np.unique(epochs).tolist()
            }
            yield [int(orders[e][i]) for e, i in zip(epochs.tolist(), within, strict=True)]
            first += share.micro_batch

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.num_sequences, self.seed, epoch)


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """Every index once, as an epoch has them `(num_sequences,)`."""
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)
