"""Rounding of an export: what the training decides, and the remedies of a failed check."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from flash.errors import InputError
from flash.export.formats import ExportSource, publish
from flash.export.rounding import (
    FailedRounding,
    RoundingChoice,
    rounded_decoder,
    trained_rounding,
    warn_of_other_rounding,
)
from flash.export.settings import ExportFormat, FormatSettings
from flash.lowering.rounding_check import check_rounding
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.checkpoint import load, save, state_to_save
from flash.rounding.settings import Rounding, TrainedRounding
from flash.training.settings import RecipeSettings
from tests.lowering.conftest import toy_model

QAT = RecipeSettings(name="t", tokens=1, qat=True, qat_rotate=False, qat_group_size=64)


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes a checkpoint of a recipe."""

    def write(recipe: RecipeSettings = QAT):
        rounding = recipe.trained_rounding
        metadata = None if rounding is None else rounding.to_metadata()
        model = toy_model("F-")
        folder = tmp_path / "first" / "checkpoint"
        save(folder, model.spec, state_to_save(model, torch.bfloat16), metadata=metadata)
        return folder

    return write


def test_a_copied_checkpoint_knows_the_rounding_of_its_training(checkpoint, tmp_path, caplog):
    copied = shutil.copytree(checkpoint(), tmp_path / "copied")
    expected = TrainedRounding(group_size=64, embedding_bits=4, rotate=False)
    assert trained_rounding(copied) == expected
    assert RoundingChoice.of(LoweringSettings(), copied) == RoundingChoice(Rounding.gptq, False)
    warn_of_other_rounding("x", LoweringSettings(rotate=True), copied)
    assert "x was trained with recipe.qat_group_size=64, not with device.lowering.gr" in caplog.text
    assert "recipe.qat_rotate=false, not with device.lowering.rotate=true" in caplog.text
    with safe_open(copied / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers requires it


def test_weights_that_were_not_trained_for_rounding_are_turned(checkpoint):
    weights = checkpoint(RecipeSettings(name="t", tokens=1))
    assert trained_rounding(weights) is None
    assert RoundingChoice.of(LoweringSettings(), weights) == RoundingChoice(Rounding.gptq, True)


def test_a_folder_for_transformers_keeps_the_rounding_of_the_training(checkpoint, tmp_path):
    weights = checkpoint()
    rounding = trained_rounding(weights)
    source = ExportSource(
        model=load(weights).eval(),
        text=torch.arange(24),
        tokenizer=None,
        metadata=rounding.to_metadata(),
    )
    publish(ExportFormat.hf, tmp_path / "made", source, FormatSettings(), "key")
    assert trained_rounding(tmp_path / "made" / "hf") == rounding


def test_an_older_checkpoint_is_known_by_the_result_beside_it(checkpoint, monkeypatch):
    weights = checkpoint(RecipeSettings(name="t", tokens=1))
    result = SimpleNamespace(settings={"recipe": {"qat": True}})
    monkeypatch.setattr("flash.export.rounding.TrainResult.read", lambda folder: result)
    assert trained_rounding(weights) == TrainedRounding(
        group_size=32, embedding_bits=4, rotate=False
    )


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_other_roundings_are_no_remedy_where_parts_were_chosen_for_this_one(mixed):
    text = torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(1))
    model, choice = toy_model("F-"), RoundingChoice(Rounding.nearest, True)
    lowering, gate = LoweringSettings(max_context=64), GateSettings(max_kl_quantized=1e-9)
    calibration = text.view(4, -1)
    rounded = rounded_decoder(model, lowering, choice, calibration)
    failed = FailedRounding(
        model=model,
        rounded=rounded,
        lowering=lowering,
        choice=choice,
        check=check_rounding(model, rounded, [text], gate),
        texts=[text],
        gate=gate,
        calibration=calibration,
        mixed=mixed,
    )
    told = failed.remedy(["first", "second"])
    assert told.endswith("train it for the rounding, and export that:\n  first\n  second")
    assert ("\nrotate + gptq " in told) is not mixed
    assert ("embedding in 8 bits" in told) is not mixed
    assert ("give a higher limit of mixed (other ways to round were not tried" in told) is mixed


@pytest.mark.parametrize("text", ["{", json.dumps({"turned": True}), "[]"])
def test_damaged_metadata_are_named(checkpoint, monkeypatch, text):
    monkeypatch.setattr(TrainedRounding, "to_metadata", lambda self: {"rounding": text})
    with pytest.raises(
        InputError, match=r"checkpoint: damaged metadata \(.*copy the weights again"
    ):
        trained_rounding(checkpoint())
