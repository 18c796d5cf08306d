"""Number of logical shards that suits the data: each has documents of every source."""

import dataclasses
import logging
from typing import TYPE_CHECKING

import numpy as np

from flash.data.mixture import MIN_DOCUMENTS, Split, StreamedSequences, slices_per_file
from flash.data.sources import turn_of
from flash.errors import InputError

if TYPE_CHECKING:
    from flash.data.sources import TextSource

log = logging.getLogger(__name__)


def fit_logical_shards(sequences: StreamedSequences) -> StreamedSequences:
    """Lower the number of logical shards to the largest divisor that the documents suffice for.

    Sources are read from their beginning, until each logical shard has some documents; a source
    that has less is read to its end. A data set of the hub is not read where each logical shard has
    files of its own. The number is a function of the data alone, so that no rank or worker changes
    it.

    Raises:
        InputError: A source has no documents at all.
    """
    most = sequences.logical_shards
    divisors = [count for count in range(most, 0, -1) if most % count == 0]
    for source in sequences.sources:
        count = next(count for count in divisors if _suffices(sequences, source, count))
        if count < divisors[0]:
            divisors = divisors[divisors.index(count) :]
            log.info(
                "data.logical_shards=%d: %d are used, so that each has %d or more documents of %s",
                most,
                count,
                MIN_DOCUMENTS,
                source.settings.path,
            )
    return dataclasses.replace(sequences, logical_shards=divisors[0])


def _suffices(sequences: StreamedSequences, source: "TextSource", count: int) -> bool:
    """True if each of `count` logical shards has enough documents of a source.

    Raises:
        InputError: A single logical shard has none.
    """
    if source.files is None and source.num_files >= count:
        return True
    needed = MIN_DOCUMENTS if count > 1 else 1
    reader = _Reader(sequences, source, count, needed)
    for file in range(source.num_files):
        reader.read(file)
        if (reader.found >= needed).all():
            return True
    if count > 1:
        return False
    remedy = ""
    if sequences.split is Split.train and reader.aside == reader.rows:
        percent = sequences.validation_percent
        remedy = f": lower data.validation_percent={percent}, or set data.validation"
    raise InputError(
        f"{source.key}.path={source.settings.path}: has 0 documents with "
        f"{sequences.encoder.needed} in {reader.rows} rows, {reader.aside} of which are "
        f"null, damaged or of the validation split; expected one or more{remedy}"
    )


class _Reader:
    """Counter of the documents of each logical shard, up to the number that is needed.

    Args:
        sequences: Encoder and split of the documents.
        source: Source to read.
        count: Number of logical shards.
        needed: Documents to find for each.

    Attributes:
        found: Documents of each logical shard.
        rows: Number of rows read.
        aside: Number of rows that are null, damaged or of the other split.
    """

    def __init__(
        self, sequences: StreamedSequences, source: "TextSource", count: int, needed: int
    ) -> None:
        self.sequences, self.source, self.needed = sequences, source, needed
        self.found = np.zeros(count, np.int64)
        self.rows = self.aside = 0
        self._stride = slices_per_file(source.num_files, count)

    def read(self, file: int) -> None:
        """Read a file until all logical shards that read it have enough documents."""
        stride, files = self._stride, self.source.num_files
        lacking = {(file + files * offset) % len(self.found) for offset in range(stride)}
        lacking = {shard for shard in lacking if self.found[shard] < self.needed}
        if not lacking:
            return
        for index, row in enumerate(self.source.rows(file, 0, 1, 0)):
            block, place = divmod(index, stride)
            offset = (place - turn_of(block, stride)) % stride
            shard = (file + files * offset) % len(self.found)
            self.rows += 1
            if shard not in lacking:
                continue
            if not self.sequences.reads(row, self.source):
                self.aside += 1
                continue
            usable = self.sequences.encoder.usable(row.value)
            if isinstance(usable, InputError):
                self.source.refuse(row, usable)
                self.aside += 1
                continue
            self.found[shard] += usable
            if self.found[shard] >= self.needed:
                lacking.remove(shard)
                if not lacking:
                    return
