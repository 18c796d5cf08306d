"""Trained checkpoints are found by name, by folder and by architecture."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.paths import Runs
from flash.training.checkpoints import checkpoint_folder, find_checkpoint
from flash.training.result import FitResult, TrainResult, ValidationMetrics
from tests.conftest import SMALL

NARROW = SMALL.replace(ffn_dim=64)
CHANGE = {"ffn_dim": 64}


def trained(runs: Runs, name: str, spec=NARROW) -> None:
    """Write the result and the checkpoint of a training."""
    quality = ValidationMetrics(2.0, 1.0, 10)
    fit = FitResult(1, 10, 1.0, 0.1, 1.0)
    TrainResult(name, spec, 1, quality, quality, fit, f"key of {name}", {}).write(runs.model(name))
    save(runs.model(name) / "checkpoint", spec, state_to_save(Decoder(spec), torch.float32))


@pytest.fixture
def find(backbone_settings, tmp_path):
    """Function that finds the checkpoint for the settings `arch` and `model`, and the name."""
    runs, backbone = Runs(tmp_path / "runs"), Backbone.open(backbone_settings)

    def call(name: str, arch=CHANGE, model=None):
        return find_checkpoint(SimpleNamespace(arch=arch, model=model), name, backbone, runs)

    return call


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "runs")


def test_the_backbone_itself_has_its_own_weights(find, backbone_folder, runs):
    trained(runs, "small", SMALL)
    assert find("small", arch={}) == (SMALL, backbone_folder)


def test_a_training_is_found_by_its_architecture(find, runs):
    trained(runs, "narrow")
    trained(runs, "other", SMALL.replace(ffn_dim=96))
    expected = NARROW, runs.model("narrow") / "checkpoint"
    assert find("small-ffn_dim_64") == expected
    assert find("small-ffn_dim_64-group_size_64") == expected
    assert find("any", arch={}, model="narrow") == expected
    assert find("any", model=str(expected[1])) == expected


def test_the_name_of_a_training_comes_before_a_folder_of_that_name(
    find, runs, monkeypatch, tmp_path
):
    trained(runs, "narrow")
    (tmp_path / "narrow").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("model", "narrow", runs) == runs.model("narrow") / "checkpoint"
    assert checkpoint_folder("model", "./narrow", runs) == Path("narrow")


def test_of_several_that_of_the_same_name_is_taken(find, runs):
    for name in ("x", "x-continue", "x-continue-seed_1"):
        trained(runs, name)
    assert find("x")[1].parent.name == "x"
    assert find("x-continue-group_size_64")[1].parent.name == "x-continue"
    with pytest.raises(
        InputError, match=r"found x, x-continue, x-continue-seed_1; give model=NAME"
    ):
        find("y")


def test_a_damaged_result_of_another_training_is_no_obstacle(find, runs, caplog):
    trained(runs, "narrow")
    trained(runs, "broken")
    (runs.model("broken") / "result.json").write_text("{", "utf-8")
    assert find("y")[1].parent.name == "narrow"
    assert "broken/result.json: damaged" in caplog.text


def test_what_is_missing_or_of_another_architecture_is_named(find, runs):
    with pytest.raises(InputError, match=r"^model=null: expected trained weights in .*models/x/ch"):
        find("x")
    with pytest.raises(InputError, match=r"^model=z: expected the folder .*none in .*models yet"):
        find("x", model="z")
    trained(runs, "narrow")
    with pytest.raises(InputError, match=r"^start=narow: expected .*did you mean .*narrow"):
        checkpoint_folder("start", "narow", runs)
    with pytest.raises(InputError, match=r"model=narrow: holds arch .* leave \+arch out"):
        find("x", arch={"ffn_dim": 96}, model="narrow")
    trained(runs, "wide", SMALL.replace(ffn_dim=96))
    with pytest.raises(InputError, match=r"wide/checkpoint: holds arch .*give the model=NAME"):
        find("wide")
