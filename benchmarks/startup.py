"""Time and memory of a command that does no work: `--help`, and a misspelt key.

    python benchmarks/startup.py [RUNS]

Every figure is of fresh processes, the cases in turns: `help_s` and `typo_s` are wall seconds,
`help_mib` is the largest resident set of `--help`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from record import SMOKE, Recorder

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "search", "export")
TYPO = "data.seq_lenn=1"
RUNS = 1 if SMOKE else 7


def timed(script: str, argument: str) -> tuple[float, float]:
    """Wall seconds and peak resident memory [MiB] of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, f"{script}.py", argument],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    expected = 0 if argument == "--help" else 2
    if os.waitstatus_to_exitcode(status) != expected:
        raise RuntimeError(f"{script}.py {argument}: exit code other than {expected}")
    return seconds, usage.ru_maxrss / 1024


def main(runs: int) -> None:
    """Measure all cases in turns and keep the lines."""
    figures: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(runs):
        for script in SCRIPTS:
            seconds, mib = timed(script, "--help")
            figures.setdefault((script, "help_s", "s"), []).append(seconds)
            figures.setdefault((script, "help_mib", "MiB"), []).append(mib)
            figures.setdefault((script, "typo_s", "s"), []).append(timed(script, TYPO)[0])
    recorder = Recorder("startup")
    for (script, metric, unit), values in figures.items():
        recorder.add(script, metric, values, unit)
    recorder.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else RUNS)
