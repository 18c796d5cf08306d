"""Facts about the evaluation of a candidate: interruptions, lack of memory, checkpoints."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flash.arch import parse_pattern
from flash.errors import InputError, is_stop
from flash.model.backbone import Backbone
from flash.paths import Runs
from flash.search.evaluate import ShortTraining, remove_checkpoints
from flash.search.loop import EvaluationError
from flash.search.pruner import TrialPruned
from flash.training.settings import Precision, RecipeSettings, Schedule, TrainerSettings
from flash.workspace import Workspace
from tests.conftest import SMALL

RECIPE = RecipeSettings(
    name="t", tokens=8 * 128, batch_size=4, calibration_tokens=256, schedule=Schedule.wsd
)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=1)
SPEC = SMALL.replace(layer_types=parse_pattern("F-"))


@pytest.fixture
def evaluate(backbone_settings, data_settings, tmp_path) -> ShortTraining:
    runs = Runs(tmp_path / "runs")
    backbone = Backbone.open(backbone_settings)
    workspace = Workspace(
        runs=runs, backbone=backbone, data_settings=data_settings, batch_size=RECIPE.batch_size
    )
    importance = workspace.importance(RECIPE.calibration_tokens)
    return ShortTraining(workspace, importance, RECIPE, TRAINER, 0, tmp_path / "trials")


def test_candidates_learn_from_a_teacher_that_spoke_ahead(evaluate, monkeypatch):
    monkeypatch.setattr("flash.data.teacher_cache.PART_TOKENS", 8 * 32)
    recipe = dataclasses.replace(RECIPE, kd_weight=0.9, kd_top_k=16)
    taught = ShortTraining(evaluate.workspace, evaluate.importance, recipe, TRAINER, 0)
    monkeypatch.setattr("flash.training.teacher.load_teacher", None)
    again = ShortTraining(evaluate.workspace, evaluate.importance, recipe, TRAINER, 0)
    assert taught(SPEC, 0).loss == again(SPEC, 0).loss != evaluate(SPEC, 0).loss


def left(evaluate: ShortTraining, number: int) -> list[str]:
    """List the names of a candidate's checkpoints."""
    folder = evaluate.checkpoints(SPEC, number)
    assert folder is not None
    return sorted(path.name for path in folder.glob("*"))


def test_an_interrupted_trial_goes_on_from_its_last_checkpoint(evaluate):
    whole = evaluate(SPEC, 0)
    seen = []

    def interrupt(curve):
        seen.append(len(curve.losses))
        if seen == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(SPEC, 1, interrupt)
    assert left(evaluate, 1) == ["last.ckpt"]
    resumed = evaluate(SPEC, 1, interrupt)
    assert seen == [1, 2, 3, 4, 4, 5, 6, 7, 8]  # part 4 came before its checkpoint
    assert resumed.loss == whole.loss
    assert resumed.info["curve"] == whole.info["curve"]
    assert left(evaluate, 1) == ["last.ckpt", "stable.ckpt"]
    seen.clear()
    again = evaluate(SPEC, 1, interrupt)  # killed before its result was recorded
    assert (again.loss, again.info["curve"], seen) == (whole.loss, whole.info["curve"], [])
    evaluate.release(SPEC, 1)
    assert left(evaluate, 1) == ["stable.ckpt"]


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), InputError),
        (torch.OutOfMemoryError("CUDA out of memory"), InputError),
        (MemoryError(), InputError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
@pytest.mark.parametrize(
    "where", ["search.evaluate.prune", "training.fit.fit", "search.evaluate.validate"]
)
def test_a_lack_of_memory_stops_the_search_and_names_the_remedy(
    evaluate, monkeypatch, error, becomes, where
):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(f"flash.{where}", fail)
    with pytest.raises(becomes) as raised:
        evaluate(SPEC, 0)
    assert is_stop(raised.value) == (becomes is InputError)


def test_a_diverged_trial_fails_and_faults_around_it_stop_the_search(evaluate):
    evaluate.recipe = dataclasses.replace(RECIPE, lr=1e30)
    with pytest.raises(EvaluationError, match="training diverged"):
        evaluate(SPEC, 0)
    evaluate.recipe = dataclasses.replace(RECIPE, kd_weight=0.9, kd_top_k=16)
    with pytest.raises(InputError, match="teacher") as raised:
        evaluate(SPEC, 1)
    assert is_stop(raised.value)


def test_a_pruned_trial_tells_how_far_it_came(evaluate):
    def stop(curve):
        if len(curve.losses) == 6:
            raise TrialPruned(3.0, 0.01, curve)

    with pytest.raises(TrialPruned) as stopped:
        evaluate(SPEC, 0, stop)
    info = stopped.value.info
    assert info["tokens"] == 6 * 128
    assert [tokens for tokens, _ in info["curve"]] == [128 * part for part in range(1, 7)]
    assert info["importance"] == evaluate.importance.digest


def test_only_beaten_candidates_lose_their_checkpoints(evaluate):
    names = []
    for number in range(3):
        folder = evaluate.checkpoints(SPEC, number)
        assert folder is not None
        folder.mkdir(parents=True)
        (folder / "stable.ckpt").touch()  # 2 is being trained by another worker
        names.append(folder.name)
    (Path(evaluate.folder or "") / ".DS_Store").touch()
    remove_checkpoints(evaluate, {1, 7})
    there = sorted(path.name for path in Path(evaluate.folder or "").iterdir())
    assert there == [".DS_Store", names[0], names[2]]
