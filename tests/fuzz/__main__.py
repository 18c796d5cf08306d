"""Long tier: `python -m tests.fuzz [KIND ...] [--tries N] [--only NUMBER] [--seed N]`.

Goes on where an earlier call with the same log stopped. Prints each fault; the log has a line for
each attempt.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

from tests.fuzz.attempt import fault, run
from tests.fuzz.base import make
from tests.fuzz.kinds import KINDS, load_all


def main() -> int:
    """Run the suite and return 3 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND")
    parser.add_argument("--tries", type=int, default=200, help="attempts of each kind")
    parser.add_argument("--only", type=int, help="number of one attempt, whose folder is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="project and log")
    options = parser.parse_args()
    load_all()
    make(options.folder / "project")
    log = options.folder / f"log_{options.seed}.jsonl"
    done = Counter(
        json.loads(line)["kind"]
        for line in (log.read_text("utf-8").splitlines() if log.is_file() else [])
    )
    faults = 0
    for kind in options.kinds or KINDS:
        start = 0 if options.only is not None else done[kind]
        faults += _try(kind, options, log, start)
    return 3 if faults else 0


def _try(kind: str, options: argparse.Namespace, log: Path, start: int) -> int:
    """Make the attempts of a kind and return the number of faults."""
    attempts = KINDS[kind](Random(f"{kind} {options.seed}"), options.folder / "project")
    found, began = 0, time.monotonic()
    for number, attempt in enumerate(islice(attempts, options.tries)):
        if number < start or options.only not in {None, number}:
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{kind}_"))
        ending = run(attempt, folder / "a")
        said = fault(attempt, ending, folder / "a" / "work")
        if options.only is not None:
            print(
                f"{attempt.what}\n{folder}\n{ending.output}\n{ending.errors}\n{ending.code}: {said}"
            )
            return 0
        with log.open("a", encoding="utf-8") as file:
            row = {"kind": kind, "number": number, "what": attempt.what, "code": ending.code}
            said_last = ending.errors.strip().rpartition("\n")[2][:300]
            print(json.dumps({**row, "fault": said, "said": said_last}), file=file)
        if said is not None:
            found += 1
            print(f"{kind} {number}: {attempt.what}\n    {said}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    print(f"{kind}: {found} faults from {start} to {options.tries} in {seconds:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
