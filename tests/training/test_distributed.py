"""Runs on two processes of this machine (gloo) against runs on one, and their checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flash.errors import InputError
from flash.model.checkpoint import state_to_save
from flash.training.fit import fit
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings
from tests.training.decoders import make_model

RECIPE = RecipeSettings(name="test", tokens=8 * 128, batch_size=4, lr=3e-3, kd_weight=0.5)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=4)
# A script in a file, because Lightning starts the second process with the same command.
SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from flash.data.corpus import PackedData, find_tokenizer
from flash.data.settings import DataKind, DataSettings
from flash.data.tokenizer import load_tokenizer
from flash.model.checkpoint import state_to_save
from flash.training.fit import fit
from flash.training.settings import Strategy
from flash.ranks import is_main_process
import dataclasses
from tests.training.decoders import make_model
from tests.training.test_distributed import RECIPE, TRAINER, teacher

strategy, max_steps, corpus, cache, folder, out = sys.argv[1:]
data = DataSettings(name="test", kind=DataKind.folder, path=corpus, validation_percent=20,
                    seq_len=32, bpe_vocab_size=320, validation_sequences=8)
tokenizer = load_tokenizer(find_tokenizer(data, None, Path(cache)))
packed = PackedData(data, tokenizer, batch_size=4, seed=0, cache=Path(cache))
trainer = dataclasses.replace(TRAINER, devices=2, strategy=Strategy[strategy],
                              micro_batch=1, max_steps=int(max_steps),
                              activation_checkpointing=strategy == "fsdp")
model = make_model()
done = fit(model, packed, RECIPE, trainer, teacher=teacher(), folder=Path(folder))
if is_main_process():
    save_file(state_to_save(model, torch.float32), out)
    print(json.dumps(list(done.curve)))
"""


def teacher():
    torch.manual_seed(9)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def on_two(tmp_path, corpus):
    """A function that trains on two processes and returns losses and final weights."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT, "utf-8")

    def run(strategy: str, steps: int, folder: Path):
        out = tmp_path / f"{strategy}_{steps}.safetensors"
        command = [script, strategy, steps, corpus, tmp_path / "cache", folder, out]
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), load_file(out)

    return run


def on_one(data, steps: int, folder: Path | None):
    model = make_model()
    trainer = TrainerSettings(
        precision=Precision.fp32, checkpoint_every_steps=4, max_steps=steps, micro_batch=2
    )
    done = fit(model, data, RECIPE, trainer, teacher=teacher(), folder=folder)
    return list(done.curve), state_to_save(model, torch.float32)


def assert_same(found, expected):
    losses, weights = found
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(weights[name], tensor, rtol=2e-4, atol=2e-5)


def test_runs_move_between_one_process_ddp_and_fsdp(data, on_two, tmp_path):
    whole = on_one(data, 8, None)
    assert_same(on_one(data, 8, None), whole)
    on_two("ddp", 4, tmp_path / "a")
    assert_same(on_two("fsdp", 8, tmp_path / "a"), whole)
    on_two("fsdp", 4, tmp_path / "b")
    assert_same(on_one(data, 8, tmp_path / "b"), whole)
    on_one(data, 4, tmp_path / "c")
    assert_same(on_two("ddp", 8, tmp_path / "c"), whole)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    trainer = TrainerSettings(devices=2, micro_batch=3)
    assert trainer.strategy is Strategy.ddp
    assert trainer.accumulation(12) == 2
    with pytest.raises(InputError, match=r"recipe\.batch_size=4: expected a multiple of 2 devices"):
        trainer.accumulation(4)


@pytest.mark.slow
def test_the_command_starts_its_other_processes_and_says_an_error_once(
    backbone_folder, corpus, tmp_path
):
    def run(*changes: str) -> subprocess.CompletedProcess[str]:
        command = [
            "train.py",
            f"backbone.weights={backbone_folder}",
            "data=folder",
            f"data.path={corpus}",
            "data.pattern=*.py",
            "data.seq_len=32",
            "data.validation_sequences=4",
            "recipe.tokens=512",
            "recipe.calibration_tokens=256",
            "trainer.devices=2",
            "logger=none",
            "+arch.ffn_dim=64",
            "name=two",
            f"runs={tmp_path}",
            *changes,
        ]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True)

    done = run("trainer=cpu", "recipe.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / "two" / "checkpoint" / "model.safetensors").is_file()
    assert done.stderr.count("before training") + done.stdout.count("before training") == 1
    again = run("trainer=cpu", "recipe.batch_size=3")
    assert again.returncode == 2
    assert again.stderr.count("error: recipe.batch_size=3") == 1
