"""W&B runs of a training, whose content is read back from their offline files."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from flash.arch import ArchSpec
from flash.paths import Runs
from flash.records import file_digest
from flash.tracking.settings import LoggerSettings
from flash.training.callbacks import CurveRecorder
from flash.training.run import train
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from tests.conftest import SMALL
from tests.tracking.offline import read_runs

RECIPE = RecipeSettings(name="test", tokens=12 * 128, batch_size=4, lr=3e-3, calibration_tokens=256)
TRAINER = TrainerSettings(
    precision=Precision.fp32, checkpoint_every_steps=1, log_every_steps=1, eval_every_steps=4
)


@pytest.fixture
def tracked(settings):
    return dataclasses.replace(settings, logger=LoggerSettings(name="wandb", offline=True))


def test_a_run_has_its_axes_its_end_and_the_lineage_of_its_weights(tracked):
    result = train(tracked)
    runs = Runs(Path(tracked.runs))
    [run] = read_runs(runs.logs)
    assert (run.run.display_name, run.run.job_type, run.run.run_group) == ("cut", "train", "small")
    assert set(run.run.tags) == {"backbone:small", "recipe:test", "arch:cut"}
    assert run.config["recipe"]["lr"] == 3e-3
    steps = [row for row in run.history if "train/loss" in row]
    assert [row["train/tokens"] for row in steps] == [128 * step for step in range(1, 13)]
    assert sorted(run.values("train/seconds")) == run.values("train/seconds")
    assert steps[0]["train/lr"] == pytest.approx(RECIPE.peak_lr(64, 32) * RECIPE.lr_factor(0, 12))
    checks = [row for row in run.history if "val/loss" in row]
    assert [row["train/tokens"] for row in checks] == [512, 1024, 1536, 1536]
    assert run.summary["val/loss"] == result.after.loss == run.summary["val/loss_after"]
    assert run.metrics["val/*"].step_metric == "train/tokens"
    assert run.exit_code == 0
    assert [each.name for each in run.used] == ["backbone-small", "importance-small"]
    [checkpoint] = run.made
    assert (checkpoint.name, checkpoint.type) == ("checkpoint-cut", "checkpoint")
    folder = runs.model("cut") / "checkpoint"
    digests = json.loads(checkpoint.metadata)["sha256"]
    assert digests["model.safetensors"] == file_digest(folder / "model.safetensors")
    places = {each.path: each.ref for each in checkpoint.manifest.contents}
    assert places["model.safetensors"] == f"file://{folder.absolute() / 'model.safetensors'}"


def test_a_run_that_failed_is_resumed_under_its_id(tracked, monkeypatch):
    record = CurveRecorder.on_train_batch_end

    def cut_power(self, trainer, *arguments):
        if trainer.global_step == 6:
            raise RuntimeError("power cut")
        record(self, trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CurveRecorder, "on_train_batch_end", cut_power)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tracked)
    train(tracked)
    train(dataclasses.replace(tracked, seed=1, overwrite=True))
    first, second, other = read_runs(Runs(Path(tracked.runs)).logs)
    assert first.exit_code == 1
    assert first.run.run_id == second.run.run_id != other.run.run_id
    assert second.values("train/tokens")[0] == 6 * 128
    assert second.values("train/seconds")[0] > first.values("train/seconds")[-2]
    assert len(other.values("train/loss")) == 12


def test_a_run_of_a_found_architecture_is_in_the_group_of_its_study(tracked):
    runs = Runs(Path(tracked.runs))
    spec = ArchSpec.from_dict({**SMALL.to_dict(), **tracked.arch})
    path = runs.found_arch / "a_b_12_a3f9.yaml"
    path.parent.mkdir(parents=True)
    header = "# Frontier of the search study a_b: trial 12, loss 2.5000 nats a token,\n"
    path.write_text(header + yaml.safe_dump(spec.to_dict()))
    train(tracked)
    grouped = dataclasses.replace(tracked.logger, group="mine")
    train(dataclasses.replace(tracked, name="a_b_12_a3f9-seed1", seed=1, logger=grouped))
    first, second = read_runs(runs.logs)
    assert (first.run.run_group, second.run.run_group) == ("a_b", "mine")
    assert "arch:a_b_12_a3f9" in first.run.tags
    assert first.config["origin"] == {"study": "a_b", "trial": 12, "arch": "a_b_12_a3f9"}
    assert first.used[-1].name == "arch-a_b_12_a3f9"
    metadata = json.loads(first.made[0].metadata)
    assert (metadata["study"], metadata["trial"]) == ("a_b", 12)
    assert json.loads((runs.model("cut") / "wandb.json").read_text())["id"] == first.run.run_id
