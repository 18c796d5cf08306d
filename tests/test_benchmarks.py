"""Benchmarks run: each at tiny sizes, since the real ones are too long for tests."""

import ast
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
SLOW = {
    *(
        "busy",
        "case_smollm2",
        "decode_cache",
        "demo",
        "faults",
        "flash_space",
        "gpu",
        "huge_pages",
        "importance",
        "limits",
        "load",
        "lowering",
    ),
    *("method_figures", "predicted", "principles", "recovery", "repeatability", "rounding"),
    *("runners", "serving", "sliding", "table6", "tabular", "teacher", "training", "vocabulary"),
}
"""Benchmarks whose dry run takes more than some seconds."""
KEPT = ("benchmarks/results", "benchmarks/data", "docs/figures")
"""Folders that a dry run must leave as they are."""


def imported(path: Path) -> list[tuple[str, str]]:
    """Module and name of every `from flash... import` of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", alias.name) for node in nodes for alias in node.names]
    return [(module, name) for module, name in names if module.startswith(("flash", "tests"))]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_names_that_a_benchmark_imports_exist(path):
    missing = []
    for module, name in imported(path):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{module}.{name}")
    assert missing == []


def programs() -> Iterator[Any]:
    """Yield every benchmark that can be run, as parameters of a test."""
    for path in BENCHMARKS:
        text = path.read_text("utf-8")
        if 'if __name__ == "__main__":' in text and "Recorder(" in text:  # no helper of others
            marks = [pytest.mark.slow] if path.stem in SLOW else []
            yield pytest.param(path, marks=marks, id=path.stem)


def missing_requirements(path: Path) -> list[str]:
    """Name what a benchmark needs, besides the project, and this machine lacks."""
    text = path.read_text("utf-8")
    modules: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    modules -= {benchmark.stem for benchmark in BENCHMARKS}
    missing = [name for name in sorted(modules) if importlib.util.find_spec(name) is None]
    if ".write_image(" in text and not any(map(shutil.which, ("chromium", "google-chrome"))):
        missing.append("Chromium")
    return missing


def kept() -> dict[Path, tuple[int, int]]:
    """Return time of change and size of every file in `KEPT`."""
    files = [path for folder in KEPT for path in (ROOT / folder).rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", list(programs()))
def test_a_benchmark_runs_at_tiny_sizes_and_keeps_nothing(path, tmp_path):
    if missing := missing_requirements(path):
        pytest.skip(f"needs {', '.join(missing)}")
    before = kept()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), "smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    for line in lines:
        assert line.keys() == {"benchmark", "case", "metric", "value", "unit", "n", "spread"}
        assert line["benchmark"] == path.stem
        assert math.isfinite(line["value"]), line
        assert math.isfinite(line["spread"]), line
    assert kept() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(1200)
def test_all_that_waits_for_a_gpu_runs_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    script = ROOT / "benchmarks" / "gpu.py"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    found = {(line["case"], line["metric"]): line["value"] for line in lines}
    assert not [case for case, metric in found if metric == "incomplete"], done.stderr
    assert found["tests", "failed"] == 0, done.stderr
    assert found["tests", "passed"] >= 20
    assert found["losses/kd/ours", "loss"] == pytest.approx(
        found["losses/kd/plain", "loss"], rel=1e-3
    )
    for case in ("step/ce/compiled", "step/kd/compiled", "fit/training"):
        assert found[case, "tokens_per_s"] > 0
    assert len([case for case, metric in found if metric == "estimate_ratio"]) == 4
