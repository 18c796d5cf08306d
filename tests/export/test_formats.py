"""Publishing of formats: a file is checked first, and a finished one is kept."""

import copy
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flash.arch import ArchSpec
from flash.errors import CheckFailed, InputError
from flash.export.formats import FILES, ExportSource, FormatResult, check_formats, publish
from flash.export.settings import ExportFormat, FormatSettings
from flash.interop.hf_folder import write_hf
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer

TINY = Path(__file__).parents[2] / "backbones" / "tiny"


@pytest.fixture
def source() -> ExportSource:
    torch.manual_seed(0)
    spec = ArchSpec(
        model_dim=64,
        ffn_dim=96,
        layer_types="F-",
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=2048,
    )
    text = torch.randint(0, 2048, (24,))
    return ExportSource(
        model=Decoder(spec).eval(),
        text=text,
        tokenizer=ModelTokenizer.open(TINY / "tokenizer.json"),
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checked_folder_is_published_once_with_its_figures(source, tmp_path, monkeypatch):
    result = publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "key")
    assert names(tmp_path) == ["hf", "hf.json"]
    assert result.check.passed
    assert result.check.error < 1e-4
    assert result.size_bytes == sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())
    monkeypatch.setattr("flash.export.formats.write_hf", pytest.fail)
    assert publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "key") == result
    assert FormatResult.read(tmp_path, ExportFormat.hf) == result


def test_a_failed_gate_publishes_nothing_and_deletes_nothing(source, tmp_path, monkeypatch):
    kept = publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "key")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def write_wrongly(folder, model, **options):
        wrong = copy.deepcopy(model)
        wrong.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
        write_hf(folder, wrong, **options)

    monkeypatch.setattr("flash.export.formats.write_hf", write_wrongly)
    with pytest.raises(CheckFailed, match=r"the gate of format hf failed in model\.layers\.1;"):
        publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "other")
    assert names(tmp_path) == ["hf", "hf.json"]
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert FormatResult.read(tmp_path, ExportFormat.hf) == kept


def test_a_stop_in_the_middle_leaves_no_half_file(source, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flash.export.formats.check_hf", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "key")
    assert names(tmp_path) == []


def test_a_result_with_former_keys_is_read(source, tmp_path):
    result = publish(ExportFormat.hf, tmp_path, source, FormatSettings(), "key")
    path = tmp_path / "hf.json"
    path.write_text(path.read_text().replace("file_loss", "artefact_loss"))
    assert FormatResult.read(tmp_path, ExportFormat.hf) == result


def test_a_damaged_result_says_what_to_do(tmp_path):
    (tmp_path / "hf.json").write_text(json.dumps({"key": "x"}))
    with pytest.raises(InputError, match=r"hf\.json: damaged .* delete it"):
        FormatResult.read(tmp_path, ExportFormat.hf)


def test_an_architecture_that_a_format_cannot_express_is_refused_before_any_work(source):
    spec = dataclasses.replace(source.model.spec, qk_norm=True, qkv_bias=True)
    with pytest.raises(InputError, match="no stock class"):
        check_formats([ExportFormat.hf], FormatSettings(), spec, source.tokenizer)
    with pytest.raises(InputError, match=r"format=gguf: arch\.qkv_bias"):
        check_formats([ExportFormat.gguf], FormatSettings(), spec, source.tokenizer)
    with pytest.raises(InputError, match=r"format=gguf: .*formats\.gguf_tokenizer=false"):
        check_formats([ExportFormat.gguf], FormatSettings(), source.model.spec, source.tokenizer)
    check_formats([ExportFormat.executorch], FormatSettings(), spec, source.tokenizer)


@pytest.mark.skipif(find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_a_gate_without_its_program_is_refused_before_any_work(source):
    settings = FormatSettings(gguf_tokenizer=False)
    with pytest.raises(InputError, match="format=gguf: llama_cpp: not installed.*pip install"):
        check_formats([ExportFormat.gguf], settings, source.model.spec, source.tokenizer)


def test_every_format_has_a_name():
    assert set(FILES) == set(ExportFormat)
