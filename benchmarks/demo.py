"""Seconds of each stage of `make demo` on an empty `runs` folder, and of a second run.

`python benchmarks/demo.py [FOLDER]` works in FOLDER, which must not exist yet and is kept, or in a
temporary folder.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Recorder

ROOT = Path(__file__).resolve().parent.parent


def _stages(runs: Path) -> dict[str, list[str]]:
    winners = runs / "studies" / "tiny" / "winners"
    chosen = f"+arch={winners.read_text().strip()}" if winners.exists() else ""
    return {
        "search": ["search.py", f"runs={runs}"],
        "train": ["train.py", "-m", chosen, f"runs={runs}"],
        "export_backbone": ["export.py", f"runs={runs}"],
        "export_winners": ["export.py", "-m", chosen, f"runs={runs}"],
        "report": ["-m", "flash", "report", "--runs", str(runs), "--wandb", "flash"],
    }


def measure(runs: Path) -> None:
    """Time both runs, stage by stage."""
    record = Recorder("demo")
    for case in ("first", "second"):
        total = 0.0
        for stage in _stages(runs):
            command = _stages(runs)[stage]  # the winners are known only after the search
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
            seconds = time.perf_counter() - start
            total += seconds
            record.add(f"{case}/{stage}", "seconds", [seconds], "s")
        record.add(case, "seconds", [total], "s")
    record.close()


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1]).resolve()
        if folder.exists():
            sys.exit(f"error: {folder} exists: expected a new folder, or the first run is none")
        measure(folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder, "runs"))


if __name__ == "__main__":
    main()
