"""Bad input and stops of commands: how many were tried, and how many went wrong.

Runs the suites of tests/fuzz and counts their logs in `.fuzz`, so that a run which was stopped goes
on. Each kind of input has `tried` attempts: `refused` with one line and exit code 2, `failed` with
one line and exit code 1, or `used`. `faults` are crashes, hangs, tracebacks, more or less than one
line of error, and damage that is used in silence; attempts that later became tests count as they
ended when they were made. Each command that is stopped has `stops`, and `lost`: other results
afterwards, a command that does not go on, or files left behind.

`python benchmarks/faults.py [TRIES [STOPS]]`: attempts of each kind and stops of each command.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from record import SMOKE, Recorder, output

import conf

FOLDER = output(conf.ROOT / ".fuzz")
SMOKE_KINDS, SMOKE_SCENES = ["values"], ["prepare"]


def run(module: str, *words: str) -> None:
    """Run a suite to its end; its faults are in its log."""
    arguments = [sys.executable, "-m", module, *words, "--folder", str(FOLDER)]
    done = subprocess.run(arguments, cwd=conf.ROOT, stdout=sys.stderr, check=False)
    if done.returncode not in {0, 3}:
        raise SystemExit(f"{module} ended with {done.returncode}")


def rows(path: Path) -> list[dict[str, str | int | None]]:
    """Read a log; a line that a kill has cut is left out."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def main(tries: str = "1000", stops: str = "20") -> None:
    if SMOKE:
        tries, stops = "3", "1"
    run("tests.fuzz", *(SMOKE_KINDS if SMOKE else []), "--tries", tries)
    run("tests.fuzz.kills", *(SMOKE_SCENES if SMOKE else []), "--kills", stops)
    record = Recorder("faults")
    ends = {0: "used", 1: "failed", 2: "refused"}
    found: dict[str, Counter[str]] = {}
    for row in rows(FOLDER / "log_0.jsonl"):
        count = found.setdefault(str(row["kind"]), Counter(used=0, failed=0, refused=0, faults=0))
        count["tried"] += 1
        count["faults" if row["fault"] else ends[int(row["code"] or 0)]] += 1
    for row in rows(FOLDER / "kills_0.jsonl"):
        count = found.setdefault(f"stop of {row['scene']}", Counter(lost=0))
        count["stops"] += 1
        count["lost"] += row["fault"] is not None
    for case, count in found.items():
        for metric, number in count.items():
            record.add(case, metric, [number], "attempts" if "tried" in count else "stops")
    record.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
