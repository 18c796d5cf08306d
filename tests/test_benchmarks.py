"""Benchmarks are too long to run in tests; what they import from the project exists.

The one that waits for a GPU must work when one comes, so it is run at a tiny size.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


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


@pytest.mark.timeout(1200)
def test_all_that_waits_for_a_gpu_runs_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.jsonl"
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
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
