"""Installations without all packages: training on its own, and one line where a package lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash.config import one_line_errors
from flash.packages import FULL

ROOT = Path(__file__).parents[1]
LATE = {"torchao", "datasets", "pyarrow", "wandb"}
"""Packages of training that only some settings need."""
UNNEEDED = (FULL | LATE) - {"psutil", "scipy", "torchmetrics"}
"""Packages that training does without. Lightning and transformers import those that are left out
if they are there."""

# Refuses packages as if they were not installed, then runs `flash` with the other arguments.
FLASH_WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

refused = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Refuse())
from flash.cli import main
sys.exit(main())
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished interpreter, started in `folder`."""
    hidden = ("FLASH_RUNS", "FLASH_PROGRAM", "FLASH_VERB")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def flash_without(refused: set[str], folder: Path, *arguments: str):
    """The finished command `flash` where some packages are not installed."""
    return python(folder, "-c", FLASH_WITHOUT, ",".join(sorted(refused)), *arguments)


def test_training_imports_no_package_of_the_full_installation(tmp_path):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "flash" / "training").glob("*.py"))
    ]
    check = f"import sys, {', '.join(names)}; print(sorted(sys.modules.keys() & {UNNEEDED}))"
    done = python(tmp_path, "-c", check)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_winner_is_distilled_with_the_installation_for_training(corpus, tmp_path):
    done = flash_without(
        UNNEEDED,
        tmp_path,
        "train",
        "+arch.ffn_dim=256",
        "name=narrow",
        "data=folder",
        f"data.path={corpus}",
        "data.pattern=*.py",
        "data.seq_len=32",
        "data.validation_sequences=4",
        "recipe.calibration_tokens=128",
        "trainer.max_steps=2",
        "logger=none",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "models" / "narrow" / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("optuna", ["search"]),
        ("executorch", ["search"]),
        ("executorch", ["export"]),
        ("lm_eval", ["evaluate"]),
        ("plotly", ["report"]),
        ("wandb", ["export"]),
        ("wandb_workspaces", ["workspace"]),
    ],
)
def test_a_missing_package_of_the_full_installation_is_named_in_one_line(
    tmp_path, package, arguments
):
    done = flash_without({package}, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: flash {arguments[0]}: needs {package}, which is not installed; expected the full "
        "installation: pip install 'mobilellm-flash[all]'\n",
    )


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("torch", ["train"]),
        ("torch", ["train", "trainer.accelerator=auto"]),
        ("torchao", ["train", "recipe=qat", "logger=none"]),
        ("wandb", ["train"]),
        ("torch", ["prepare"]),
    ],
)
def test_a_missing_package_of_training_is_named_in_one_line(tmp_path, package, arguments):
    done = flash_without({package}, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: flash {arguments[0]}: needs {package}, which is not installed; expected the "
        "installation for training: pip install 'mobilellm-flash[train]'\n",
    )


@pytest.mark.parametrize("module", ["flash.training.typo", "executorch.typo", "rouge_typo"])
def test_other_missing_modules_stay_bugs(module, monkeypatch):
    monkeypatch.setenv("FLASH_VERB", "export")
    with pytest.raises(ModuleNotFoundError, match=module), one_line_errors():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
