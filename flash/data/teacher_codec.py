"""Codec of a teacher's most likely tokens: a few bytes per position, decoded sequence by sequence.

Log-probabilities are rounded to a multiple of 1/16 nat. Those of a position fall, so their
differences are stored, which are small. Numbers of tokens, probabilities and ids become one array
of unsigned integers, and LZMA codes it byte by byte with the frequencies that it has seen so far,
apart for high and low bytes. On the tiny backbone an id takes fewer bits in this way than the 11 of
its vocabulary (docs/results.md). The XZ container adds a checksum.
"""

import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

FORMAT = 2
"""Version of the format; names of folders depend on it. 1 was plain int32 and float16."""

STEP_NATS = 1 / 16
"""Distance between stored log-probabilities.

Each is off by at most half of it, so that the stored distribution is at most `STEP_NATS**2 / 8`
(0.0005 nats) from the teacher's (Hoeffding's lemma); about 0.00007 was seen. Leaving out all but 16
tokens costs a student of the tiny backbone 0.01 nats.
"""


@dataclass(frozen=True)
class TopTokenCodec:
    """Encoder and decoder of the likeliest tokens for one sequence.

    Attributes:
        top_k: Most tokens per position.
        vocab_size: Size of the vocabulary.
        seq_len: Positions per sequence.
    """

    top_k: int
    vocab_size: int
    seq_len: int

    @property
    def bytes_per_token(self) -> float:
        """Estimate, on the safe side, of the size of a position with `top_k` tokens."""
        return self.top_k * (math.ceil(math.log2(self.vocab_size)) + 4) / 8 + 2

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, ids: Int[Tensor, "s k"], log_probs: Float[Tensor, "s k+1"]) -> bytes:
        """Encode the tokens and log-probabilities of `flash.model.losses.TopLogProbs`."""
        top = log_probs[:, :-1].cpu().numpy()
        kept = np.isfinite(top)
        levels = _levels(np.where(kept, top, 0.0))
        falls = np.diff(levels, axis=1, prepend=0)
        parts = [
            kept.sum(axis=1),
            _levels(log_probs[:, -1].cpu().numpy()),
            falls.T[kept.T],  # rank by rank, as differences of a rank are similar
            ids.cpu().numpy()[kept],
        ]
        payload = np.concatenate(parts).astype(self._dtype).tobytes()
        return lzma.compress(payload, check=lzma.CHECK_CRC32, filters=[self._filter])

    @property
    def _filter(self) -> dict[str, int]:
        position_bits = self._dtype.itemsize.bit_length() - 1  # tells high from low bytes
        bits = {"lc": 0, "lp": position_bits, "pb": position_bits}
        # Hardly anything repeats: longer searches for repetitions only take time.
        return {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**16, "depth": 1, **bits}

    def decode(self, encoded: bytes) -> tuple[Int[Tensor, "s k"], Float[Tensor, "s k+1"]]:
        """Decode the tokens and log-probabilities of a sequence.

        Raises:
            lzma.LZMAError: The bytes are damaged.
            ValueError: They are those of a sequence of another length, number or vocabulary.
        """
        values = np.frombuffer(lzma.decompress(encoded), self._dtype).astype(np.int32)
        counts, rest = values[: self.seq_len], values[self.seq_len : 2 * self.seq_len]
        falls, kept_ids = np.split(values[2 * self.seq_len :], 2)
        if (
            len(rest) < self.seq_len
            or counts.max() > self.top_k
            or kept_ids.max(initial=0) >= self.vocab_size
        ):
            raise ValueError("is of other data or of another vocabulary")
        kept = np.arange(self.top_k) < counts[:, None]
        levels = np.zeros(kept.T.shape, np.int32)
        levels[kept.T] = falls
        top = np.where(kept, levels.cumsum(axis=0).T * -STEP_NATS, -np.inf)
        ids = np.zeros(kept.shape, np.int32)
        ids[kept] = kept_ids
        log_probs = np.concatenate([top, rest[:, None] * -STEP_NATS], axis=1, dtype=np.float32)
        # As in `TopLogProbs`, places without a token repeat the first one.
        return torch.from_numpy(np.where(kept, ids, ids[:, :1])), torch.from_numpy(log_probs)


def _levels(log_probs: np.ndarray) -> np.ndarray:
    """Multiples of `-STEP_NATS`; exp(-4096), the least, is 0 in float32 too."""
    return np.rint(log_probs / -STEP_NATS).clip(0, 2**16 - 1).astype(np.int64)
