"""Seconds of each stage of `make demo` on an empty `runs` folder, and of a second run.

`python benchmarks/demo.py [FOLDER]` works in FOLDER, which must not exist yet and is kept, or in a
temporary folder.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import SMOKE, Recorder

ROOT = Path(__file__).resolve().parent.parent
OF_MEASUREMENTS = [
    "device.processes=1",
    "device.warmups=0",
    "device.runs=1",
    "device.lowering.max_context=64",
    "device.workload.prompts=[32]",
    "device.workload.contexts=[32]",
    "device.workload.decode_tokens=4",
]
OF_TEXT = [
    "data=folder",
    f"data.path={ROOT / 'benchmarks'}",
    "data.pattern=*.py",
    "data.validation_percent=20",
    "data.validation_sequences=2",
]
OF_TRAINING = ["recipe.tokens=4096", "recipe.calibration_tokens=1024"]
OF_SEARCH = [
    "search.trials=3",
    "search.batch=1",
    "search.startup_trials=2",
    "search.winners=1",
    "latency=analytical",
    "latency.whole_models=4",
    "latency.group_size=4",
    "latency.attempts=1",
]
OF_EXPORT = ["device.lowering.calibration_tokens=1024"]
SMALL = {
    "search": [*OF_TEXT, *OF_TRAINING, *OF_MEASUREMENTS, *OF_SEARCH],
    "train": [*OF_TEXT, *OF_TRAINING],
    "export_backbone": [*OF_TEXT, *OF_MEASUREMENTS, *OF_EXPORT],
    "export_winners": [*OF_TEXT, *OF_MEASUREMENTS, *OF_EXPORT],
}
"""Settings of each stage in a smoke run."""


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
            command += SMALL.get(stage, []) if SMOKE else []
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=sys.stderr)
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
