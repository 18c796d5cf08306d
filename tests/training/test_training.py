"""Training runs: resumption after a kill, distillation, and the job behind train.py."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flash.data.module import PackedDataModule
from flash.data.settings import DataKind, DataSettings
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.checkpoint import load
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.model.tokenizer import ModelTokenizer
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.fit import fit
from flash.training.run import train
from flash.training.settings import (
    Precision,
    RecipeSettings,
    Schedule,
    TrainerSettings,
    TrainSettings,
)
from flash.training.validation import validate
from tests.conftest import SMALL
from tests.plain_losses import cross_entropy, distillation
from tests.training.decoders import make_model, same_weights

RECIPE = RecipeSettings(name="test", tokens=12 * 128, batch_size=4, lr=3e-3)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=1)


def test_training_lowers_the_held_out_loss(data):
    model = make_model()
    before = validate(model, data, Precision.fp32)
    done = fit(model, data, RECIPE, TRAINER)
    after = validate(model, data, Precision.fp32)
    assert done.steps == 12
    assert done.tokens == 12 * 128
    assert before.loss == pytest.approx(math.log(320), rel=0.02)
    assert after.loss < before.loss - 0.5
    assert after.bits_per_byte < before.bits_per_byte


def test_a_stopped_run_resumes_to_the_same_weights(data, tmp_path, caplog):
    caplog.set_level("INFO", "flash")
    whole, parts = make_model(), make_model()
    fit(whole, data, RECIPE, TRAINER)
    fit(parts, data, RECIPE, dataclasses.replace(TRAINER, max_steps=5), folder=tmp_path / "c")
    resumed = Decoder(SMALL)  # other random weights, as all state comes from the checkpoint
    done = fit(resumed, data, RECIPE, TRAINER, folder=tmp_path / "c")
    assert done.steps == 12
    assert "goes on after step 5 of 12" in caplog.text
    assert same_weights(whole, resumed)


@torch.no_grad()
def test_distillation_of_equal_models_is_zero():
    logits = make_model()(torch.randint(0, 320, (2, 16)))
    assert float(distillation(logits, logits)) == pytest.approx(0, abs=1e-6)


def test_distillation_pulls_towards_the_teacher(data):
    teacher, student = make_model(), Decoder(SMALL)
    recipe = dataclasses.replace(RECIPE, kd_weight=1.0)
    tokens = next(iter(PackedDataModule(data).val_dataloader())).tokens[:, :-1]

    @torch.no_grad()
    def divergence() -> float:
        return float(distillation(student(tokens), teacher(tokens)))

    before = divergence()
    fit(student, data, recipe, TRAINER, teacher=teacher)
    assert divergence() < before


def test_distillation_by_hand():
    student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(distillation(student, teacher)) == pytest.approx(expected)
    assert float(cross_entropy(teacher, torch.tensor([[0]]))) == pytest.approx(-math.log(0.75))


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    fit(make_model(), data, RECIPE, dataclasses.replace(TRAINER, max_steps=2), folder=tmp_path)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.ckpt: damaged"):
        fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before(data, tmp_path, monkeypatch):
    fit(make_model(), data, RECIPE, dataclasses.replace(TRAINER, max_steps=2), folder=tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left") as full:
        fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path)
    assert full.value.filename == str(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".json" and p.is_file()] == [
        "last.ckpt"
    ]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_learning_rate_rises_peaks_and_ends_at_its_share(schedule):
    recipe = RecipeSettings(
        name="x", tokens=1, schedule=schedule, warmup_ratio=0.1, final_lr_ratio=0.1
    )
    factors = [recipe.lr_factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)
    flat = sum(f == pytest.approx(1.0) for f in factors)
    assert flat > 60 if schedule is Schedule.wsd else flat < 15


@pytest.mark.parametrize("steps", [4, 6, 19])
def test_a_short_run_warms_up_too(steps):
    recipe = RecipeSettings(name="x", tokens=1, warmup_ratio=0.05)
    assert [recipe.lr_factor(step, steps) for step in range(2)] == [0.5, 1.0]
    without = dataclasses.replace(recipe, warmup_ratio=0.0)
    assert without.lr_factor(0, steps) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"^lr=0\.0: expected a positive number"),
        ({"lr": math.nan}, r"^lr=nan"),
        ({"tokens": 0}, r"^tokens=0"),
        ({"kd_weight": 1.5}, r"^kd_weight=1\.5: expected a number from 0 to 1"),
    ],
)
def test_illegal_recipes_raise(values, message):
    with pytest.raises(InputError, match=message):
        RecipeSettings(**{"name": "x", "tokens": 1, **values})


def _settings(backbone_settings, data_settings, tmp_path, **changes) -> TrainSettings:
    settings = TrainSettings(
        backbone=backbone_settings,
        data=data_settings,
        recipe=dataclasses.replace(RECIPE, kd_weight=0.5, calibration_tokens=256),
        trainer=TRAINER,
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        arch={"ffn_dim": 64, "layer_types": ["full_attention", "skip_attention"]},
        name="candidate",
        runs=str(tmp_path / "runs"),
    )
    return dataclasses.replace(settings, **changes)


def test_the_job_prunes_trains_saves_and_is_done_the_second_time(
    backbone_settings, data_settings, tmp_path, monkeypatch
):
    settings = _settings(backbone_settings, data_settings, tmp_path)
    result = train(settings)
    folder = tmp_path / "runs" / "models" / "candidate"
    assert load(folder / "checkpoint").spec == result.spec
    assert result.spec.ffn_dim == 64
    assert result.after.loss < result.before.loss
    monkeypatch.setattr("flash.training.run._train", pytest.fail)
    again = train(_settings(backbone_settings, data_settings, tmp_path))
    assert again == result


def test_a_training_that_makes_weights_worse_is_warned_of(
    backbone_settings, data_settings, tmp_path, caplog
):
    settings = _settings(backbone_settings, data_settings, tmp_path)
    hot = dataclasses.replace(settings.recipe, lr=3.0, tokens=256)
    result = train(dataclasses.replace(settings, recipe=hot))
    assert result.after.loss > result.before.loss
    assert "worse than before training; recipe.lr=3 may be too high" in caplog.text
    assert "try recipe.lr=0.3" in caplog.text


@pytest.mark.parametrize(
    ("room", "changes"),
    [
        ("data", {"document_masks": True}),
        ("data", {"validation_sequences": 3}),
        ("data", {"seq_len": 16}),
        ("trainer", {"spike_factor": 9.0}),
    ],
)
def test_a_finished_run_is_not_taken_for_one_of_other_settings(
    backbone_settings, data_settings, tmp_path, monkeypatch, room, changes
):
    settings = _settings(backbone_settings, data_settings, tmp_path)
    settings.recipe = dataclasses.replace(settings.recipe, tokens=128, kd_weight=0.0)
    train(dataclasses.replace(settings))
    monkeypatch.setattr("flash.training.run._train", lambda *_: pytest.fail("trains again"))
    other = {room: dataclasses.replace(getattr(settings, room), **changes)}
    with pytest.raises(InputError, match=r"candidate: holds a finished training of other settings"):
        train(dataclasses.replace(settings, **other))
    with pytest.raises(pytest.fail.Exception, match="trains again"):
        train(dataclasses.replace(settings, **other, overwrite=True))
    same = dataclasses.replace(settings.data, workers=1), dataclasses.replace(TRAINER, devices=1)
    train(dataclasses.replace(settings, data=same[0], trainer=same[1]))


DECIDES_NO_RESULT = {
    *("accelerator", "devices", "nodes", "strategy", "micro_batch", "activation_checkpointing"),
    *("compile", "eval_every_steps", "checkpoint_every_steps", "log_every_steps", "max_skipped"),
    "usd_per_hour",
}


def test_every_field_of_the_trainer_but_those_named_decides_the_result():
    first = TrainerSettings(precision=Precision.fp32)
    fields = {field.name for field in dataclasses.fields(first)}
    assert first.decisive().keys() == fields - DECIDES_NO_RESULT
    assert fields >= DECIDES_NO_RESULT


@pytest.mark.parametrize("name", ["../../out", "a/b", ".hidden"])
def test_names_stay_in_the_folder_of_results(name, backbone_settings, data_settings, tmp_path):
    with pytest.raises(InputError, match=r"^name=.*: expected at most 128 letters"):
        train(_settings(backbone_settings, data_settings, tmp_path, name=name))
    assert not (tmp_path.parent / "out").exists()


def test_random_weights_need_no_teacher(data_settings, tmp_path, caplog):
    random = BackboneSettings(name="random", arch=SMALL.to_dict())
    result = train(_settings(random, data_settings, tmp_path))
    assert "training candidate from random weights" in caplog.text
    assert result.fit.steps == 12


def test_a_recipe_that_inherits_nothing_starts_from_random_weights(
    backbone_settings, data_settings, tmp_path, caplog
):
    """As a backbone of the same shape and tokenizer without weights does; no scores are made."""
    fresh = dataclasses.replace(RECIPE, tokens=256, inherit=False)
    settings = _settings(backbone_settings, data_settings, tmp_path, recipe=fresh, name="fresh")
    with caplog.at_level("INFO"):
        result = train(dataclasses.replace(settings))
    assert "training fresh from random weights, as recipe.inherit=false says" in caplog.text
    assert not (tmp_path / "runs" / "importance").exists()
    heir = dataclasses.replace(fresh, inherit=True)
    inherited = train(dataclasses.replace(settings, recipe=heir, name="heir"))
    assert inherited.before != result.before
    assert inherited.key != result.key
    tokenizer = str(Path(str(backbone_settings.weights)) / "tokenizer.json")
    spec = Backbone.open(backbone_settings).spec.to_dict()
    shape = BackboneSettings(name="shape", arch=spec)
    own = dataclasses.replace(data_settings, tokenizer=tokenizer)
    alone = dataclasses.replace(settings, backbone=shape, recipe=heir, data=own, name="alone")
    same = train(alone)
    assert (same.key, same.before, same.after) == (result.key, result.before, result.after)


@pytest.mark.parametrize("top_k", [None, 8])
def test_a_smaller_vocabulary_is_cut_taught_and_kept(
    backbone_settings, data_settings, tmp_path, top_k
):
    recipe = dataclasses.replace(RECIPE, kd_weight=0.5, kd_top_k=top_k)
    arch = {"vocab_size": 290, "ffn_dim": 64}
    first = _settings(backbone_settings, data_settings, tmp_path, arch=arch, recipe=recipe)
    result = train(first)
    folder = tmp_path / "runs" / "models" / "candidate" / "checkpoint"
    tokenizer = ModelTokenizer.open(folder / "tokenizer.json")
    assert load(folder).spec.vocab_size == result.spec.vocab_size == tokenizer.size == 290
    assert result.after.loss < result.before.loss
    # A further training has the same tokens, whatever its text uses most.
    other = tmp_path / "other"
    other.mkdir()
    for i in range(60):
        (other / f"{i}.py").write_text("zyx wvu tsr qpo nml kji hgf edc ba 9876543210 " * 40)
    text = dataclasses.replace(data_settings, path=str(other))
    second = dataclasses.replace(first, arch={}, start="candidate", data=text, name="second")
    assert train(second).spec == result.spec
    again = ModelTokenizer.open(folder.parents[1] / "second" / "checkpoint" / "tokenizer.json")
    assert again.identity == tokenizer.identity


def test_vocabularies_that_cannot_be_cut_are_refused(backbone_settings, data_settings, tmp_path):
    settings = _settings(backbone_settings, data_settings, tmp_path, arch={"vocab_size": 100})
    with pytest.raises(InputError, match=r"^arch\.vocab_size=100: expected 2\d\d .*bytes"):
        train(settings)
    shards = dataclasses.replace(data_settings, kind=DataKind.shards)
    settings.arch = {"vocab_size": 290}
    with pytest.raises(InputError, match=r"^arch\.vocab_size=290: .* data\.kind=shards holds its"):
        train(dataclasses.replace(settings, data=shards))
    settings.arch = {"vocab_size": 100_000}
    with pytest.raises(InputError, match=r"^arch\.vocab_size=100000: expected at most the backb"):
        train(settings)


def test_an_arch_that_does_not_fit_is_refused_before_any_work(
    backbone_settings, data_settings, tmp_path
):
    settings = _settings(backbone_settings, data_settings, tmp_path, arch={"ffn_dim": 1024})
    with pytest.raises(InputError, match=r"arch\.ffn_dim=1024: expected at most the backbone's"):
        train(settings)
    settings.arch = {"ffn_dim": 33}
    with pytest.raises(InputError, match=r"^arch\.ffn_dim=33: expected a multiple of 32"):
        train(settings)
    assert not (tmp_path / "runs").exists()


def _job(corpus: str, backbone: str, folder: str, every: int = 2) -> TrainSettings:
    """A job that takes some seconds."""
    return TrainSettings(
        backbone=BackboneSettings(name="small", weights=backbone),
        data=DataSettings(
            name="test",
            kind=DataKind.folder,
            path=corpus,
            validation_percent=20,
            seq_len=32,
            validation_sequences=8,
        ),
        recipe=RecipeSettings(name="t", tokens=60 * 128, batch_size=4, lr=3e-3),
        trainer=TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=every),
        logger=LoggerSettings(name="none", kind=LoggerKind.none),
        name="c",
        runs=folder,
    )


def _weights(folder) -> bytes:
    return (folder / "models" / "c" / "checkpoint" / "model.safetensors").read_bytes()


def test_a_job_that_is_killed_or_told_to_stop_goes_on_as_if_it_had_not_been(
    data_settings, backbone_folder, tmp_path
):
    torch.set_num_threads(1)  # as in the processes below, as sums depend on it
    of = (data_settings.path, str(backbone_folder))
    script = (
        "import logging, sys\n"
        "from flash.training.run import train\n"
        "from tests.training.test_training import _job\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "train(_job(*sys.argv[1:4], every=int(sys.argv[4])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}

    def start(folder, every) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", script, *of, str(folder), str(every)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    calm, killed, told = (tmp_path / name for name in ("calm", "killed", "told"))
    train(_job(*of, str(calm)))
    with start(killed, 2) as job:
        while not list(killed.rglob("last.ckpt")) and job.poll() is None:
            time.sleep(0.01)
        job.kill()
    with start(told, 1000) as job:
        _wait_for_training(job)
        job.terminate()
        output = job.stderr.read()
        assert job.wait() == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    assert list(told.rglob("last.ckpt"))  # written by the signal alone
    for folder in (killed, told):
        assert not (folder / "models" / "c" / "result.json").exists()
        train(_job(*of, str(folder)))
        assert _weights(folder) == _weights(calm)


def _wait_for_training(job) -> None:
    """Wait until the process catches SIGTERM, as it does from its first step on."""
    until = time.monotonic() + 120
    while job.poll() is None and time.monotonic() < until:
        status = Path(f"/proc/{job.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGUSR2 - 1) & 1:
            return
        time.sleep(0.005)
    pytest.fail("the job never began to train")
