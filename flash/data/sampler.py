"""Order of the training sequences and their division among ranks.

The order of the sequences is the same for any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flash.errors import InputError


@dataclass(frozen=True)
class Share:
    """Share of one rank in every global batch.

    Sequences are numbered throughout the run. Step n learns from numbers n * batch_size to
    (n + 1) * batch_size - 1. Rank r of W gets the numbers with number % W == r, in this order, cut
    into `accumulation` micro-batches.

    Attributes:
        batch_size: Sequences per optimizer step, over all ranks.
        world_size: Number of ranks.
        rank: Number of this rank.
        accumulation: Micro-batches per optimizer step.

    Raises:
        InputError: The global batch is not a multiple of ranks x accumulation.
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
        """Sequences per micro-batch of this rank."""
        return self.batch_size // (self.world_size * self.accumulation)

    def sequences_after(self, steps: int) -> int:
        """Number of sequences that this rank has received after `steps` optimizer steps."""
        return steps * self.batch_size // self.world_size


class ResumableBatchSampler:
    """Endless micro-batches of dataset indices; the n-th depends on seed, share and n alone.

    Each epoch is a permutation of its own that contains every sequence exactly once. It begins
    where the previous epoch ends, even within a batch.

    Args:
        num_sequences: Size of the dataset. A batch that is larger holds sequences several times.
        share: Share of this rank.
        seed: Seed of all permutations.
        start: Optimizer steps to skip.
    """

    def __init__(self, num_sequences: int, share: Share, seed: int, start: int = 0) -> None:
        self.num_sequences, self.share = num_sequences, share
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[int]]:
        share, first = self.share, self.share.sequences_after(self.start)
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
    """Permutation of all sequence indices for one epoch, `(num_sequences,)`."""
    return np.random.default_rng((seed, epoch)).permutation(num_sequences)
