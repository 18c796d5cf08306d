"""Folders as people have them: how many are read as the stock library reads them.

    python benchmarks/real_folders.py [KIND ...]

Makes folders of each kind, reads them with our code and with the stock library, and counts them:
`tried`, `right` (both read the same), `refused` (our error names the key or file) and `wrong`. The
wrong ones are printed to stderr, and the exit code is then 1. Without KIND all kinds run, and the
lines are kept.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from record import SMOKE, Recorder
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.data import odd_files, odd_tokenizers
from tests.model import config_variants
from tests.verdicts import Outcome, Verdict


def _tokenizers(folder: Path) -> Iterator[Verdict]:
    return map(_verdict, odd_tokenizers.verdicts())


def _data_files(folder: Path) -> Iterator[Verdict]:
    return map(_verdict, odd_files.verdicts(folder))


def _verdict(named: tuple[str, str]) -> Verdict:
    """Translate a name and a verdict in words, such as `refused: ...`."""
    name, text = named
    outcome, _, reason = text.partition(": ")
    return Verdict(name, Outcome(outcome), reason)


KINDS: dict[str, Callable[[Path], Iterator[Verdict]]] = {
    "configs": config_variants.verdicts,
    "tokenizers and templates": _tokenizers,
    "data files and chats": _data_files,
}
"""For each kind, a function that makes its folders under a path and yields a verdict on each."""

MOST = 3 if SMOKE else None
"""Number of folders of a kind; None for all of them."""


def main(kinds: list[str]) -> int:
    """Judge all folders of `kinds`, or of every kind; the exit code is 1 if one was wrong."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recorder, wrong = Recorder("real_folders"), 0
    for kind in kinds or KINDS:
        counts: Counter[Outcome] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for verdict in islice(KINDS[kind](Path(folder)), MOST):
                counts[verdict.outcome] += 1
                if verdict.outcome is Outcome.wrong:
                    print(f"{kind}: {verdict.case}: {verdict.reason}", file=sys.stderr)
        recorder.add(kind, "tried", [counts.total()], "folders")
        for outcome in Outcome:
            recorder.add(kind, outcome.value, [counts[outcome]], "folders")
        wrong += counts[Outcome.wrong]
    if not kinds:
        recorder.close()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
