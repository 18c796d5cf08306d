"""Facts about what a command opens: each part once, when it is asked for, with its errors."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.errors import InputError
from flash.model.backbone import Backbone
from flash.paths import Runs
from flash.workspace import Workspace, arch_of, result_name


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
