"""Teacher cache: a teacher's most likely tokens for training sequences, stored on disk."""

import logging
import lzma
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
from flash.data.teacher_codec import TopTokenCodec
from flash.errors import InputError
from flash.records import atomic_write

log = logging.getLogger(__name__)

PART_TOKENS = 2**13
"""Approximate number of targets per file. A file is computed as a whole, also for a run that needs
less of it, and a kill loses the one that is being written."""

TeacherForward = Callable[[list[Batch]], tuple[Int[Tensor, "b s k"], Float[Tensor, "b s k+1"]]]
"""Function from sequences to their `Batch.top_ids` and `Batch.top_log_probs`."""


class TeacherCache(Dataset[Batch]):
    """Training sequences with the cached `top_ids` and `top_log_probs` of a teacher.

    The files hold the sequences in the order of the first epoch. Runs with any number of tokens,
    ranks and micro-batches and any batch size read the same files; a longer run adds files. A file
    is written as a whole or not at all.

    Args:
        sequences: The training sequences without a teacher.
        seed: Seed of the order of the first epoch.
        folder: Folder of the files; its name must depend on everything that decides their content.
        codec: Format of a sequence in the files.
    """

    def __init__(
        self, sequences: PackedSequences, seed: int, folder: Path, codec: TopTokenCodec
    ) -> None:
        self.sequences, self.folder, self.codec = sequences, folder, codec
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
            start, end = file.get_slice("offsets")[row : row + 2].tolist()
            encoded = file.get_slice("payload")[start:end].numpy().tobytes()
            ids, log_probs = self.codec.decode(encoded)
        except (OSError, ValueError, SafetensorError, lzma.LZMAError) as error:
            raise InputError(
                f"{path}: missing or damaged ({error}); delete it and start again"
            ) from error
        return self.sequences[index]._replace(top_ids=ids, top_log_probs=log_probs)

    def path(self, part: int) -> Path:
        """Path of the file with number `part`."""
        return self.folder / f"part_{part:05d}.safetensors"

    def missing(self, count: int) -> list[int]:
        """Numbers of the missing and damaged files for a run of `count` sequences."""
        rows = min(count, len(self))
        return [part for part in range(-(-rows // self._rows)) if not self.has(part)]

    def has(self, part: int) -> bool:
        """True if a file is there and whole, as far as can be told without its payload.

        Each sequence in the payload has a checksum of its own, which is checked when it is read.
        """
        path = self.path(part)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                offsets, payload = file.get_tensor("offsets"), file.get_slice("payload")
                kinds = str(offsets.dtype), payload.get_dtype()
                size = payload.get_shape()
        except (OSError, SafetensorError) as error:
            log.warning("%s: damaged (%s); made again", path, error)
            return False
        whole = (
            kinds == ("torch.int64", "U8")
            and offsets.shape == (len(self.members(part)) + 1,)
            and [int(offsets[0]), int(offsets[-1])] == [0, *size]
            and bool((offsets.diff() > 0).all())
        )
        if not whole:
            log.warning("%s: damaged; made again", path)
        return whole

    def members(self, part: int) -> Sequence[int]:
        """Indices of the sequences in a file, in the order of its rows."""
        return self.order[part * self._rows : (part + 1) * self._rows].tolist()

    def write(self, part: int, teacher: TeacherForward, at_once: int) -> Iterator[int]:
        """Compute and write one file.

        Args:
            part: Number of the file.
            teacher: Function that computes the tokens and probabilities.
            at_once: Most sequences per call of `teacher`.

        Yields:
            Number of sequences of each call, once it has returned.
        """
        indices = self.members(part)
        encoded: list[bytes] = []
        for start in range(0, len(indices), at_once):
            batch = [self.sequences[i] for i in indices[start : start + at_once]]
            top_ids, top_log_probs = teacher(batch)
            encoded += map(self.codec.encode, top_ids.cpu(), top_log_probs.cpu())
            yield len(batch)
        tensors = {
            "offsets": torch.tensor([0, *map(len, encoded)]).cumsum(0),
            "payload": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        }
        with atomic_write(self.path(part)) as file:
            file.write(save(tensors))


@lru_cache(maxsize=64)
def _open(path: Path):  # noqa: ANN202, a type without a public name
    return safe_open(path, framework="pt")
