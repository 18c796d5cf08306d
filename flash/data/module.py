"""Batches for Lightning."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from flash.data.corpus import DataSettings, find_documents, read_text
from flash.data.packed import PackedSequences, ResumableBatches, TokenStreams, tokenize
from flash.data.tokenizer import load_tokenizer, train_tokenizer
from flash.files import write_text


def find_tokenizer(settings: DataSettings, default: Path | None, cache: Path) -> Path:
    """The tokenizer.json to use: the setting's, else `default`, else one trained on the corpus.

    Raises:
        InputError: The named file cannot be used.
    """
    path = Path(settings.tokenizer) if settings.tokenizer else default
    if path is not None:
        load_tokenizer(path)
        return path
    training = [
        document
        for document in find_documents(settings)
        if not document.is_held_out(settings.heldout_percent)
    ]
    trained = cache / f"bpe_{settings.name}_{settings.bpe_vocab_size}.json"
    if not trained.is_file():
        tokenizer = train_tokenizer(map(read_text, training), settings.bpe_vocab_size)
        write_text(trained, tokenizer.to_str())
    return trained


class PackedData(L.LightningDataModule):
    """Training batches in a reproducible, resumable order, and the held-out sequences.

    Args:
        settings: Corpus and sequence length.
        tokenizer: Encodes the corpus.
        batch_size: Sequences a batch.
        seed: Order of the training sequences.
        cache: Folder for token streams.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        cache: Path,
    ) -> None:
        super().__init__()
        self.settings, self.batch_size, self.seed = settings, batch_size, seed
        self.streams: TokenStreams = tokenize(settings, tokenizer, cache)
        self.train_set = PackedSequences(self.streams.train, settings.seq_len)
        heldout = PackedSequences(self.streams.heldout, settings.seq_len)
        count = min(settings.heldout_sequences or len(heldout), len(heldout))
        # Evenly spread, so that a few sequences still come from many files.
        chosen = torch.linspace(0, len(heldout) - 1, count).long().unique().tolist()
        self.heldout_set: Subset[Tensor] = Subset(heldout, chosen)

    def train_dataloader(self) -> DataLoader[Tensor]:
        done = self._batches_done()
        batches = ResumableBatches(len(self.train_set), self.batch_size, self.seed, done)
        return DataLoader(self.train_set, batch_sampler=batches)  # pyright: ignore[reportArgumentType]

    def _batches_done(self) -> int:
        # The order is a function of the number of batches, so a checkpoint needs no other state.
        if self.trainer is None:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.heldout_set, batch_size=self.batch_size)

    def calibration_batches(self, tokens: int) -> Iterator[Tensor]:
        """Training sequences `(b, seq_len)` for importance scores, about `tokens` in all."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train_set), generator=generator)
        count = max(1, min(len(order), tokens // self.settings.seq_len))
        for chunk in order[:count].split(self.batch_size):
            yield torch.stack([self.train_set[int(i)][:-1] for i in chunk])
