"""What a teacher says about training sequences, kept on disk and read beside their tokens."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from flash.data.batch import Batch
from flash.data.packed import PackedSequences
from flash.data.sampler import epoch_order
from flash.errors import InputError
from flash.records import atomic_write

PART_TOKENS = 2**16
"""About how many tokens a file is of."""

Answer = Callable[[list[Batch]], tuple[Int[Tensor, "b s k"], Float[Tensor, "b s k+1"]]]
"""Sequences to their `Batch.top_ids` and `Batch.top_log_probs`."""


class TaughtSequences(Dataset[Batch]):
    """Training sequences with `top_ids` and `top_log_probs`, of a run that is known ahead.

    Kept in the order in which the first epoch has the sequences, whole files only: a run of any
    number of tokens, batch size, ranks and micro-batches reads them, and a longer one adds to them.

    Args:
        sequences: Without a teacher.
        seed: Decides the order.
        folder: Of the files; by all that decides what is in them.
    """

    def __init__(self, sequences: PackedSequences, seed: int, folder: Path) -> None:
        self.sequences, self.folder = sequences, folder
        self.order = epoch_order(len(sequences), seed, 0)
        self._row = np.argsort(self.order)
        self._rows = max(1, PART_TOKENS // sequences.seq_len)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Batch:
        part, row = divmod(int(self._row[index]), self._rows)
        path = self.path(part)
        try:
            file = _open(path)
            ids, log_probs = (file.get_slice(name)[row] for name in ("ids", "log_probs"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: missing or damaged ({error}); delete it and start again"
            ) from error
        return self.sequences[index]._replace(top_ids=ids, top_log_probs=log_probs)

    def path(self, part: int) -> Path:
        """File of that number."""
        return self.folder / f"part_{part:05d}.safetensors"

    def missing(self, count: int) -> list[int]:
        """Numbers of the files that a run of `count` sequences still lacks."""
        rows = min(count, len(self))
        return [part for part in range(-(-rows // self._rows)) if not self.path(part).is_file()]

    def members(self, part: int) -> Sequence[int]:
        """Indices of the sequences in a file, in its order."""
        return self.order[part * self._rows : (part + 1) * self._rows].tolist()

    def write(self, part: int, answer: Answer, at_once: int) -> Iterator[int]:
        """Write a file, `at_once` sequences at a time; yields how many were done."""
        indices = self.members(part)
        ids: list[Tensor] = []
        log_probs: list[Tensor] = []
        for start in range(0, len(indices), at_once):
            batch = [self.sequences[i] for i in indices[start : start + at_once]]
            of_batch = answer(batch)
            ids.append(of_batch[0].to("cpu", torch.int32))
            # 11 bits: half a percent of a probability around exp(-10), which hardly matters.
            log_probs.append(of_batch[1].to("cpu", torch.float16))
            yield len(batch)
        tensors = {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}
        with atomic_write(self.path(part)) as file:
            file.write(save(tensors))


@lru_cache(maxsize=64)
def _open(path: Path):  # noqa: ANN202, a type without a public name
    return safe_open(path, framework="pt")
