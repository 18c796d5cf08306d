"""The notebook runs from its first cell to its last, in a clone and beside an installed package."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"


def test_the_tour_is_committed_without_outputs():
    notebook = nbformat.read(TOUR, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")  # Jupyter's own
@pytest.mark.parametrize("clone", [True, False], ids=["clone", "wheel"])
def test_the_tour_runs(clone, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOUR.parents[1])]))
    folder = TOUR.parent
    if not clone:  # without benchmarks/data
        folder = tmp_path / "docs"
        folder.mkdir()
        shutil.copy(TOUR, folder)
    notebook = nbformat.read(folder / TOUR.name, as_version=4)
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute()
    said = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )  # fmt: skip
    assert ("512 trained candidates" if clone else "0 trained candidates") in said
    assert "28 trials" in said
    assert "FAIL" not in said
    assert "prefill_512: " in said
