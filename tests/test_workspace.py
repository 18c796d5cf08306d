"""Facts about what a command opens: each part once, when it is asked for, with its errors."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.tokenizer import train_tokenizer
from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.errors import InputError
from flash.interop.hf_folder import write_hf
from flash.model.backbone import Backbone
from flash.model.checkpoint import save, state_to_save
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.workspace import Workspace, arch_of, result_name
from tests.conftest import SMALL, opened


@pytest.fixture
def workspace(backbone_settings, data_settings, tmp_path) -> Workspace:
    return Workspace(
        runs=Runs(tmp_path / "runs"),
        backbone=Backbone.open(backbone_settings),
        data_settings=data_settings,
        device_settings=DeviceSettings(name="host"),
    )


def test_every_part_is_opened_once(workspace):
    assert workspace.data is workspace.data
    assert workspace.tokenizer is workspace.tokenizer
    assert isinstance(workspace.device, HostDevice)
    assert workspace.device is workspace.device


def test_a_device_is_asked_once_who_it_is(workspace, monkeypatch):
    identity = workspace.device.identity()
    monkeypatch.setattr(HostDevice, "_identify", pytest.fail)
    assert workspace.device.identity() == identity


def test_importance_is_computed_once_and_kept(workspace, monkeypatch):
    scores = workspace.importance(64)
    monkeypatch.setattr("flash.prune.importance.score", pytest.fail)
    again = replace(workspace).importance(64)
    assert again.digest == scores.digest
    assert len(list((workspace.runs.root / "importance").iterdir())) == 1


def test_importance_belongs_to_its_tokens_and_its_text(workspace, corpus, tmp_path):
    first, more = workspace.importance(64), workspace.importance(512)
    assert (first.tokens, more.tokens) == (64, 512)
    data = workspace.data_settings
    shorter = replace(workspace, data_settings=replace(data, seq_len=16)).importance(512)
    assert shorter.tokens == 512
    assert shorter.digest != more.digest
    other = tmp_path / "text"
    shutil.copytree(corpus, other)
    for path in other.iterdir():
        path.write_text(path.read_text("utf-8").upper(), "utf-8")
    changed = replace(workspace, data_settings=replace(data, path=str(other))).importance(512)
    assert changed.digest != more.digest
    measured = replace(workspace, data_settings=replace(data, validation_sequences=3))
    assert measured.importance(512).digest == more.digest
    assert len(list((workspace.runs.root / "importance").iterdir())) == 4


def test_sequences_longer_than_the_context_are_refused(workspace):
    data = replace(workspace.data_settings, seq_len=2 * workspace.backbone.spec.max_context)
    with pytest.raises(InputError, match=r"data\.seq_len=\d+: expected at most \d+"):
        _ = replace(workspace, data_settings=data).data


def test_a_result_has_the_name_given_or_the_backbones(backbone_settings):
    named = SimpleNamespace(name="mine", backbone=backbone_settings)
    assert result_name(named) == "mine"
    named.name = None
    assert result_name(named) == backbone_settings.name


def test_an_arch_changes_the_backbones(workspace):
    spec = workspace.backbone.spec
    assert arch_of({}, workspace.backbone) == spec
    smaller = spec.layer_types[:1]
    assert arch_of({"layer_types": smaller}, workspace.backbone).layer_types == smaller
    with pytest.raises(InputError, match="arch.stock=lfm2_350m: expected an architecture of ours"):
        arch_of({"stock": "lfm2_350m"}, workspace.backbone)


def test_a_result_keeps_what_the_backbones_folder_says(tmp_path, corpus, data_settings):
    """Keep begin and both ends in all files that a result has."""
    made = train_tokenizer([path.read_text("utf-8") for path in sorted(corpus.iterdir())], 310)
    made.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    begin, *ends = [made.token_to_id(name) for name in ("<|begin|>", "<|end|>", "<|turn|>")]
    folder = tmp_path / "source"
    model = Decoder(SMALL)
    save(folder, SMALL, state_to_save(model, torch.bfloat16))
    made.save(str(folder / "tokenizer.json"))
    ids = {"bos_token_id": begin, "eos_token_id": ends}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **ids}), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({**ids, "top_k": 20}), "utf-8")
    backbone = Backbone.open(BackboneSettings(name="chat", weights=str(folder)))
    workspace = Workspace(
        runs=Runs(tmp_path / "runs"), backbone=backbone, data_settings=data_settings
    )
    workspace.save_model(tmp_path / "checkpoint", model)
    write_hf(tmp_path / "hf", model, tokenizer=workspace.tokenizer)
    for name in ("checkpoint", "hf"):
        for file in ("config.json", "generation_config.json"):
            values = json.loads((tmp_path / name / file).read_text("utf-8"))
            assert [values["bos_token_id"], values["eos_token_id"]] == [begin, ends]
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name).generation_config
        assert [stock.bos_token_id, stock.eos_token_id, stock.top_k] == [begin, ends, 20]


CHAT = "{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"


def test_the_chat_template_that_was_taught_is_saved_with_its_end_of_turn(tmp_path, corpus):
    made = train_tokenizer([path.read_text("utf-8") for path in sorted(corpus.iterdir())], 310)
    made.add_special_tokens(["<|turn|>"])
    folder = tmp_path / "source"
    tokenizer = opened(made, tmp_path / "tokenizer")
    tokenizer = tokenizer.with_chat("{{ messages }}", None)
    model = Decoder(SMALL)
    save(folder, SMALL, state_to_save(model, torch.bfloat16), tokenizer=tokenizer)
    (tmp_path / "taught.jinja").write_text(CHAT, "utf-8")
    data = DataSettings(
        name="chat",
        kind=DataKind.chat,
        sources=[TextSourceSettings(path="chats.jsonl", column="messages")],
        chat_template=str(tmp_path / "taught.jinja"),
    )
    backbone = Backbone.open(BackboneSettings(name="chat", weights=str(folder)))
    workspace = Workspace(runs=Runs(tmp_path / "runs"), backbone=backbone, data_settings=data)
    workspace.save_model(tmp_path / "checkpoint", model)
    stock = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert stock.chat_template == CHAT
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text("utf-8"))
    assert config["eos_token_id"] == [0, made.token_to_id("<|turn|>")]
    # Commands that are given these weights take their tokenizer before the backbone's.
    later = replace(workspace, model_folder=tmp_path / "checkpoint")
    assert later.tokenizer.chat_template == stock.chat_template
    assert later.tokenizer.ends == (0, made.token_to_id("<|turn|>"))
