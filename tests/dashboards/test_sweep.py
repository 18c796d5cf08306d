"""The sweep that comes with flash, and the commands that W&B's own agent makes of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from wandb import wandb_agent

from flash.bundled import CONF
from flash.config import ROOTS, load, register
from tests.dashboards.test_dashboards import is_logged

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
OPEN = {"min", "max", "mu", "sigma", "q", "distribution"}
"""Keys of a parameter without a list of values."""


def examples(parameter: dict[str, Any]) -> list[Any]:
    """Values of a parameter that a sweep may choose."""
    if "values" in parameter:
        return parameter["values"]
    assert parameter.keys() <= OPEN
    return [parameter["min"], parameter["max"]]


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """Function that makes the command and the environment of a run, as W&B's agent does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FLASH_VERB", "train")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "ab12cd34")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # set by the agent, undone after the test
    started = []

    class Process:
        def __init__(self, env: dict[str, str], command: list[str], **options: object) -> None:
            started.append((command, env))

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)

    def start(sweep: dict[str, Any], values: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
        runner = wandb_agent.Agent(api=None, queue=None, sweep_id="ab12cd34")
        runner._sweep_command = list(sweep["command"])
        arguments = {key: {"value": value} for key, value in values.items()}
        runner._command_run({"run_id": "0a1b2c3d", "program": sweep["program"], "args": arguments})
        return started[-1]

    return start


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_composes(path, agent):
    sweep = yaml.safe_load(path.read_text("utf-8"))
    assert sweep["method"] in {"bayes", "grid", "random"}
    assert sweep["metric"]["goal"] in {"minimize", "maximize"}
    assert is_logged(sweep["metric"]["name"])
    assert (ROOT / sweep["program"]).is_file()
    register()
    chosen = {key: examples(parameter) for key, parameter in sweep["parameters"].items()}
    for index in range(max(map(len, chosen.values()))):
        values = {key: some[index % len(some)] for key, some in chosen.items()}
        command, _ = agent(sweep, values)
        assert command[:3] == ["/usr/bin/env", "flash", "train"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            settings = load(compose("train", command[3:]), ROOTS["train"])
        for key, value in values.items():
            group, _, field = key.partition(".")
            assert getattr(getattr(settings, group), field) == value


@pytest.mark.slow
def test_a_run_of_a_sweep_trains_offline_and_logs_its_metric(agent, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} of eight.\n" * 500, "utf-8")
    sweep = yaml.safe_load((ROOT / "sweeps" / "train_lr.yaml").read_text("utf-8"))
    data = ["data=folder", f"data.path={tmp_path}", "data.validation_percent=50", "data.seq_len=64"]
    sweep["command"][-1:-1] = ["trainer.max_steps=2", *data]  # shared by all runs, as a user would
    command, env = agent(sweep, {"recipe.lr": 0.0012345678901234567, "recipe.batch_size": 2})
    program = tmp_path / "bin" / "flash"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m flash "$@"\n', "utf-8")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{env['PATH']}"
    env |= {"PATH": path, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").rglob("run-*.wandb")
    assert run.name == "run-0a1b2c3d.wandb"  # the id that the agent chose
    assert sweep["metric"]["name"].encode() in run.read_bytes()
    assert len(list((tmp_path / "runs" / "models").iterdir())) == 1
