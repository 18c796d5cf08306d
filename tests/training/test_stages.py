"""Stages after pruning: instruction tuning, quantization-aware training, chains of stages."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from flash.data.corpus import PackedData
from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.tokenizer import load_tokenizer, train_tokenizer
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.model.checkpoint import load, save, state_to_save
from flash.model.tokenizer import ModelTokenizer
from flash.paths import Runs
from flash.prune.importance import fingerprint
from flash.rounding.decoder import turn_decoder
from flash.rounding.fake import fake_quantize
from flash.rounding.grid import round_to_grid
from flash.training.fit import fit
from flash.training.result import TrainResult
from flash.training.run import check, train
from flash.training.settings import Precision, RecipeSettings, StageSettings, TrainerSettings
from flash.training.validation import validate
from flash.workspace import Workspace
from tests.conftest import SMALL
from tests.training.decoders import make_model

TEMPLATE = Path("conf/data/chatml.jinja")
RECIPE = RecipeSettings(
    name="test", tokens=8 * 256, batch_size=4, lr=3e-3, calibration_tokens=256, kd_weight=0.5
)
TRAINER = TrainerSettings(precision=Precision.fp32)


@pytest.fixture
def chat(tmp_path) -> DataSettings:
    """Conversations of very unequal length, so that some sequences have few tokens to learn."""
    path = tmp_path / "chats.jsonl"
    rows = []
    for i in range(60):
        turns = [
            {"role": "user", "content": f"return x + {i} " * (1 + i % 4)},
            {"role": "assistant", "content": "def f(x): return x\n" * (1 + (7 * i) % 5)},
        ]
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return DataSettings(
        name="chat",
        kind=DataKind.chat,
        sources=[TextSourceSettings(path=str(path), column="messages")],
        chat_template=str(TEMPLATE),
        validation_percent=20,
        validation_sequences=4,
        seq_len=64,
        logical_shards=2,
        document_masks=True,
    )


def test_the_gradient_is_the_mean_over_tokens_that_count(chat, backbone_folder, tmp_path):
    tokenizer = load_tokenizer(backbone_folder / "tokenizer.json")
    results = []
    for micro_batch in (None, 1, 2):
        data = PackedData(chat, tokenizer, batch_size=4, seed=0, cache=tmp_path)
        model = make_model()
        trainer = dataclasses.replace(TRAINER, micro_batch=micro_batch)
        done = fit(model, data, dataclasses.replace(RECIPE, kd_weight=0.0), trainer)
        results.append((list(done.curve), model))
    (curve, whole), *others = results
    for found, model in others:
        assert found == pytest.approx(curve, rel=1e-4)
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_stages_follow_each_other_and_are_done_once(settings, chat, monkeypatch):
    tuning = dataclasses.replace(RECIPE, kd_weight=0.0, tokens=4 * 256)
    settings.then = {"ift": StageSettings(recipe=tuning, data=chat)}
    settings.scale = 0.5
    last = train(settings)
    models = Path(settings.runs) / "models"
    first = TrainResult.read(models / "cut")
    assert (first.fit.tokens, last.fit.tokens) == (4 * 256, 2 * 256)
    assert last.name == "cut_ift"
    assert load(models / "cut_ift" / "checkpoint").spec == first.spec
    assert last.settings["start"] == str(models / "cut" / "checkpoint")
    monkeypatch.setattr("flash.training.run._train", pytest.fail)
    assert train(dataclasses.replace(settings)) == last


def test_a_changed_start_is_another_run(settings, tmp_path):
    train(settings)
    cut = Path(settings.runs) / "models" / "cut" / "checkpoint"
    on = dataclasses.replace(settings, arch={}, start=str(cut), name="on")
    first = train(on)
    model = load(cut)
    tokenizer = ModelTokenizer.open(cut / "tokenizer.json")
    save(cut, model.spec, state_to_save(model, torch.float32), tokenizer=tokenizer)
    with pytest.raises(InputError, match="holds a finished training of other settings, text or we"):
        train(on)
    assert train(dataclasses.replace(on, overwrite=True)).key != first.key


def test_a_start_of_another_arch_is_refused(settings, backbone_folder):
    settings.start = str(backbone_folder)
    with pytest.raises(InputError, match=r"start=.*holds arch 3L .* expected 2L .*leave \+arch"):
        train(settings)


def test_devices_that_are_not_there_are_named_before_any_work(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    settings.trainer = TrainerSettings(accelerator="gpu")
    with pytest.raises(InputError, match=r"trainer\.accelerator=gpu: expected 1 CUDA device"):
        train(settings)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    settings.trainer = TrainerSettings(accelerator="gpu", devices=4)
    with pytest.raises(InputError, match=r"trainer\.devices=4: expected 4 CUDA device.*found 2"):
        train(settings)
    with pytest.raises(InputError, match=r"start=nowhere: expected the folder of a trained"):
        train(dataclasses.replace(settings, start="nowhere"))


def test_quantization_aware_training_is_of_the_rounded_model(settings):
    train(settings)
    cut = Path(settings.runs) / "models" / "cut" / "checkpoint"
    settings = dataclasses.replace(
        settings,
        start=str(cut),
        name="qat",
        recipe=dataclasses.replace(RECIPE, qat=True, qat_calibration_tokens=0),
    )
    result = train(settings)
    model, rounded = load(cut), load(cut)
    fake_quantize(rounded)
    workspace = Workspace(
        runs=Runs(Path(settings.runs)),
        backbone=Backbone.open(settings.backbone),
        data_settings=settings.data,
        batch_size=RECIPE.batch_size,
    )
    losses = [validate(each, workspace.data, Precision.fp32).loss for each in (model, rounded)]
    assert result.before.loss == losses[1] != losses[0]
    assert result.after.loss < result.before.loss
    plain = load(Path(settings.runs) / "models" / "qat" / "checkpoint")
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}


def test_quantization_aware_training_leaves_weights_on_their_grid(settings):
    train(settings)
    cut = Path(settings.runs) / "models" / "cut" / "checkpoint"
    model = load(cut)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[:3] = 0  # channels that nothing reads
    tokenizer = ModelTokenizer.open(cut / "tokenizer.json")
    save(cut, model.spec, state_to_save(model, torch.bfloat16), tokenizer=tokenizer)
    recipe = dataclasses.replace(RECIPE, qat=True, lr=1e-4)
    train(dataclasses.replace(settings, start=str(cut), name="qat", recipe=recipe))
    trained = turn_decoder(load(Path(settings.runs) / "models" / "qat" / "checkpoint"))
    for layer in trained.model.layers:
        for weight in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight):
            rounded = round_to_grid(weight, 32, 4).weight()
            assert (rounded - weight).abs().max() < 0.05 * weight.std()  # as bfloat16 keeps it


def test_calibration_that_memory_cannot_hold_is_refused_before_any_work(settings):
    recipe = dataclasses.replace(RECIPE, qat=True, qat_calibration_tokens=10**12)
    with pytest.raises(
        InputError,
        match=r"recipe\.qat_calibration_tokens=10{12}: expected at most \d+: .* GiB of memory",
    ):
        check(dataclasses.replace(settings, recipe=recipe))
    stage = StageSettings(data=settings.data, recipe=recipe)
    with pytest.raises(InputError, match=r"then\.last\.recipe\.qat_calibration_tokens=10{12}"):
        check(dataclasses.replace(settings, then={"last": stage}))


def test_a_start_brings_its_own_tokenizer(settings, corpus):
    train(settings)
    cut = Path(settings.runs) / "models" / "cut" / "checkpoint"
    texts = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    other = train_tokenizer([*texts, *(f"w{i} x{i * i}" for i in range(999))], 400)
    assert other.get_vocab_size() > SMALL.vocab_size
    other.save(str(cut / "tokenizer.json"))
    with pytest.raises(InputError, match=rf"data\.tokenizer={cut}.* entries: expected at most"):
        train(dataclasses.replace(settings, arch={}, start=str(cut), name="on"))


def test_a_context_beyond_the_backbones_is_refused(settings):
    settings.data = dataclasses.replace(settings.data, seq_len=129)
    with pytest.raises(InputError, match=r"data\.seq_len=129: expected at most 128"):
        train(settings)


def test_fingerprints_cover_every_shard(tmp_path):
    weights = state_to_save(make_model(), torch.float32)
    save(tmp_path / "m", SMALL, weights)
    before = fingerprint(tmp_path / "m")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save(tmp_path / "m", SMALL, weights)
    assert fingerprint(tmp_path / "m") != before
