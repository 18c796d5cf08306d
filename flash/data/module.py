"""Lightning data module: resumable training batches, and batches for validation."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flash.data.batch import Batch, collate
from flash.data.corpus import MAX_BATCH, PackedData
from flash.data.mixture import StreamedSequences
from flash.data.sampler import ResumableBatchSampler, Share
from flash.data.stream import SequenceStream, StreamLoader
from flash.errors import InputError


class _Fallible(Dataset[Batch | InputError]):
    """Sequences whose errors are values, because a loader with workers would wrap exceptions."""

    def __init__(self, sequences: Dataset[Batch]) -> None:
        self._sequences = sequences

    def __getitem__(self, index: int) -> Batch | InputError:
        try:
            return self._sequences[index]
        except InputError as error:
            return error


def _collate(sequences: list[Batch | InputError]) -> Batch | InputError:
    batches = []
    for sequence in sequences:
        if isinstance(sequence, InputError):
            return sequence
        batches.append(sequence)
    return collate(batches)


class PackedDataModule(L.LightningDataModule):
    """Batches of packed data in a reproducible, resumable order.

    The order is the same for any number of ranks, micro-batches and workers. A run resumes from a
    checkpoint with any other number of them. The trainer must not add a sampler of its own
    (`use_distributed_sampler=False`).

    Args:
        data: The sequences.
    """

    __qualname__ = "PackedData"  # Lightning keeps the state in checkpoints under this name

    def __init__(self, data: PackedData) -> None:
        super().__init__()
        self.data = data
        self._steps: int | None = None
        self._states: Tensor | None = None
        self._trained: list[Tensor | None] = []

    def setup(self, stage: str) -> None:
        # A run begins. If it resumes from a checkpoint, Lightning calls `load_state_dict` next.
        if stage == "fit":
            self._steps, self._states, self._trained = None, None, []

    @property
    def share(self) -> Share:
        """Share of this rank in each batch."""
        trainer = self.trainer
        if trainer is None:
            return Share(self.data.batch_size)
        return Share(
            self.data.batch_size,
            trainer.world_size,
            trainer.global_rank,
            trainer.accumulate_grad_batches,
        )

    def train_dataloader(self) -> "DataLoader[Batch] | StreamLoader":
        if self._steps is None:
            # No batch has been counted yet: a new run, or a checkpoint that holds the step only.
            self._steps = self.trainer.global_step if self.trainer is not None else 0
        share, workers = self.share, self.data.settings.workers
        if isinstance(self.data.train_set, StreamedSequences):
            if self._states is None:
                self._states = self.data.train_set.initial_states()
                self._steps = 0
            stream = SequenceStream(self.data.train_set, share, self._steps, self._states.clone())
            return StreamLoader(stream, workers)
        batches = ResumableBatchSampler(
            len(self.data.train_set), share, self.data.seed, self._steps
        )
        sequences: Dataset[Batch] = (
            self.data.teacher_cache if self.data.teacher_cache is not None else self.data.train_set
        )
        loader: Any = DataLoader(  # of batches; an error in place of one is raised below
            _Fallible(sequences),
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=_collate,
            num_workers=workers,
        )
        return loader

    def on_before_batch_transfer(self, batch: Batch | InputError, dataloader_idx: int) -> Batch:
        """Count the batches that are trained on; workers and Lightning have read further ahead.

        Raises:
            InputError: The batch cannot be read.
        """
        if isinstance(batch, InputError):
            raise batch
        if self.trainer is not None and self.trainer.training:
            self._trained.append(batch.stream_state)
            if len(self._trained) == self.share.accumulation:
                self._count_step()
        return batch

    def _count_step(self) -> None:
        assert self._steps is not None
        self._steps += 1
        for states in self._trained:
            if states is not None:
                assert self._states is not None
                for state in states:  # in order, so that the last state of a logical shard counts
                    self._states[int(state[0])] = state
        self._trained = []

    def state_dict(self) -> dict[str, Any]:
        """Steps trained on and the state of each logical shard; the same on all ranks."""
        states = self._states.clone() if self._states is not None else None
        if states is not None and self.trainer is not None and self.trainer.world_size > 1:
            strategy = self.trainer.strategy
            gathered = strategy.all_gather(states.to(strategy.root_device))
            shards = torch.arange(len(states))
            states = gathered.cpu()[shards % self.trainer.world_size, shards]
        return {"steps": self._steps, "stream_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the steps of a checkpoint.

        Raises:
            InputError: The checkpoint belongs to streamed data of other sources or shards.
        """
        states = state_dict.get("stream_states", state_dict.get("places"))  # its former name
        if isinstance(self.data.train_set, StreamedSequences):
            initial = self.data.train_set.initial_states()
            if states is None or states.shape != initial.shape:
                raise InputError(
                    "data: the checkpoint is of other data.sources or data.logical_shards; start "
                    "over with another name, or set them back"
                )
            self._states = states.clone()
        self._steps = state_dict["steps"]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank's validation sequences; every rank has the same number of them.

        Raises:
            InputError: The validation split has fewer sequences than there are ranks.
        """
        share = self.share
        total = len(self.data.validation_set)
        if total < share.world_size:
            raise InputError(
                f"data.validation_sequences={total}: expected at least one for each of "
                f"{share.world_size} ranks"
            )
        mine = np.arange(share.rank, total, share.world_size)
        # Batches of two or more, so that ranks with one sequence less do not have a batch less.
        size = max(2, min(share.micro_batch, MAX_BATCH))
        batches = np.array_split(mine, -(-total // share.world_size) // size or 1)
        return DataLoader(
            self.data.validation_set,
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=collate,
        )
