"""Recording of results: JSON lines on stdout, and the last complete run in results/.

`python benchmarks/NAME.py smoke` runs a benchmark at tiny sizes, to show that it runs: its figures
mean nothing, and all that it writes goes to a temporary folder.
"""

import atexit
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_VARIABLE = "FLASH_BENCHMARK_SMOKE"
"""Environment variable by which the processes of a smoke run know its temporary folder."""


def _smoke_folder() -> Path | None:
    """Return the temporary folder of a smoke run, made by its first process, or None.

    The word `smoke` is removed from the arguments, so that those of the benchmark are left.
    """
    if sys.argv[1:2] == ["smoke"]:
        del sys.argv[1]
        folder = tempfile.TemporaryDirectory(prefix="flash-smoke-", ignore_cleanup_errors=True)
        atexit.register(folder.cleanup)
        os.environ[_VARIABLE] = folder.name
    name = os.environ.get(_VARIABLE)
    return Path(name) if name else None


_FOLDER = _smoke_folder()
SMOKE = _FOLDER is not None
"""True in a smoke run."""


def output(path: Path) -> Path:
    """Return the path to write: `path`, or its last part in the folder of a smoke run."""
    return path if _FOLDER is None else _FOLDER / path.name


@dataclass(frozen=True)
class Line:
    """One result: median over n runs, with the interquartile range as spread."""

    benchmark: str
    case: str
    metric: str
    value: float
    unit: str
    n: int
    spread: float


class Recorder:
    """Recorder that prints each line at once; `close` replaces the kept results."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.lines: list[str] = []

    def add(self, case: str, metric: str, values: Sequence[float], unit: str) -> None:
        """Report the median of `values`."""
        ordered = sorted(values)
        spread = 0.0
        if len(ordered) > 1:
            first, _, third = statistics.quantiles(ordered, n=4, method="inclusive")
            spread = third - first
        value = statistics.median(ordered)
        line = Line(self.benchmark, case, metric, _short(value), unit, len(ordered), _short(spread))
        self.lines.append(json.dumps(asdict(line)))
        print(self.lines[-1], flush=True)

    def close(self) -> None:
        """Keep the lines of a complete run."""
        machine = {
            "benchmark": self.benchmark,
            "case": "machine",
            "metric": "cores",
            "value": os.cpu_count(),
            "unit": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
            "n": 1,
            "spread": 0.0,
        }
        path = output(RESULTS) / f"{self.benchmark}.jsonl"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join([json.dumps(machine), *self.lines]) + "\n", "utf-8")
        temporary.replace(path)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def rss_mib() -> float:
    """Return the current resident memory of this process [MiB]."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def peak_rss_mib() -> float:
    """Return the peak resident memory of this program so far [MiB].

    `ru_maxrss` is unsuitable: a child inherits it from the process that started it.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def in_fresh_process(script: str, case: str, *arguments: str) -> dict[str, Any]:
    """Run `script case arguments... RESULT` in its own process; return the JSON that it wrote.

    Peak memory can only be measured in a process that did nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, script, case, *arguments, str(path)]
        subprocess.run(command, check=True)
        return json.loads(path.read_text("utf-8"))


def made(path: Path, script: str, *arguments: str) -> Path:
    """Return a file; if it is missing, `script arguments... PATH` writes it in its own process."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, script, *arguments, str(path)], check=True)
    return path


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each of `runs` in turn, `rounds` times, so that drift of the machine affects all."""
    values: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            values[name].append(run())
    return values
