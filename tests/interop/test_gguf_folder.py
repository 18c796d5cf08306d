"""GGUF files as Hugging Face folders: the model, the tokenizer and what it names come back."""

import json

import gguf
import numpy as np
import pytest
import torch

from flash.cli import main
from flash.errors import InputError
from flash.interop.gguf import write_gguf
from flash.interop.gguf_folder import convert
from flash.interop.settings import GgufFormat
from flash.model.checkpoint import load
from flash.model.tokenizer import ModelTokenizer
from tests.interop.test_gguf import PRE, byte_level, decoder, saved

TEXTS = ["In 2024 there were 365 days", "don't  DO\n\n\tthat; 1234567", "Köln 東京 café <think>x"]


def source(folder, pre: str) -> ModelTokenizer:
    """Tokenizer whose files name a begin-of-text token and two end tokens."""
    path = saved(byte_level(pre), folder)
    names = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    think = byte_level(pre).token_to_id("<think>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, think]}))
    return ModelTokenizer.open(path)


@pytest.mark.parametrize("pre", PRE)
def test_a_model_comes_back_with_tokenizer_and_end_tokens(pre, tmp_path):
    qk_norm = pre == "qwen2"
    model = decoder("FFF", qk_norm, norm_eps=1e-5, rope_theta=123456.0)
    tokenizer = source(tmp_path / "source", pre)
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tokenizer=tokenizer, weight_format=GgufFormat.f32)
    convert(file, tmp_path / "hf")
    again = load(tmp_path / "hf")
    assert (again.spec.norm_eps, again.spec.rope_theta) == (1e-5, 123456.0)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(again(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    found = ModelTokenizer.open(tmp_path / "hf" / "tokenizer.json")
    assert found.ends == tokenizer.ends
    assert found.begin == tokenizer.begin
    for text in TEXTS:
        assert found.encode(text) == tokenizer.encode(text)


def test_files_that_cannot_be_taken_leave_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a GGUF file, found none"):
        convert(tmp_path / "none.gguf", tmp_path / "hf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00broken")
    with pytest.raises(InputError, match=r"bad.gguf: damaged, or no GGUF file"):
        convert(tmp_path / "bad.gguf", tmp_path / "hf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("falcon")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre=falcon: expected one of gpt-2, smol"):
        convert(tmp_path / "odd.gguf", tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr("sys.argv", ["flash", "convert", "odd.gguf", "taken"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "taken: exists; expected the name of a new folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.gguf", "odd.gguf", "taken"}


def rewritten(file, *, without="", **changes):
    """Copy of a GGUF file without a key or a tensor, and with other values of some keys."""
    reader, path = gguf.GGUFReader(file), file.with_name("changed.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", without):
            inner = field.types[-1] if len(field.types) > 1 else None
            value = changes.get(name.rpartition(".")[2], field.contents())
            writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    tokenizer, file = source(tmp_path / "source", "smollm"), tmp_path / "model.gguf"
    write_gguf(file, decoder("FFF", False), tokenizer=tokenizer, weight_format=GgufFormat.q4_0)
    reader = gguf.GGUFReader(file)
    [tensor] = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight"]
    content = bytearray(file.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16("nan").tobytes()
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight: .* NaN or infinite"):
        convert(file, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_no_weight_or_key_of_a_file_is_made_up(tmp_path):
    tokenizer = source(tmp_path / "source", "smollm")
    file = tmp_path / "model.gguf"
    model = decoder("FFF", False)
    write_gguf(file, model, tokenizer=tokenizer, weight_format=GgufFormat.f32)
    for without, changes, message in [
        ("blk.1.attn_q.weight", {}, r"layers\.1\.self_attn\.q_proj\.weight: found none"),
        ("token_embd.weight", {}, "weights of .*: found none"),
        ("", {"block_count": 5}, r"layers\.3\..*: found none"),
        ("", {"vocab_size": 5}, r"embed_tokens\.weight: found shape \(320, 64\)"),
        ("llama.block_count", {}, r"expected llama\.block_count, found none"),
        ("llama.attention.layer_norm_rms_epsilon", {}, "epsilon, found none"),
        ("tokenizer.ggml.tokens", {}, "transformers cannot read it"),
        ("", {"eos_token_id": 99999}, "transformers cannot read it"),
        ("", {"head_count": 3}, r"transformers cannot read it \(.* not a multiple"),
    ]:
        with pytest.raises(InputError, match=rf"changed\.gguf: .*{message}") as refused:
            convert(rewritten(file, without=without, **changes), tmp_path / "hf")
        assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.gguf", "changed.gguf"}
