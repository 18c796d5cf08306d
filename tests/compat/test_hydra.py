"""Contract tests of Hydra for flash.compat.hydra."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

from tests.compat.contract import contract


@dataclass
class Settings:
    seed: int = 0
    size: int = 1


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Variables that the search path of flash reads, if an earlier test has registered it."""
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    monkeypatch.setenv("FLASH_VERB", "train")


def run_main(arguments, folder, monkeypatch, task):
    """Call Hydra's main with the arguments of a command."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (folder / "conf").mkdir()
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="contract", node=Settings)
    callback = "+hydra.callbacks.c._target_=flash.compat.hydra.RunJobs"
    monkeypatch.setattr(sys, "argv", ["x.py", "-m", *arguments, callback, "hydra/job_logging=none"])
    main = hydra.main(version_base="1.3", config_path=str(folder / "conf"), config_name="contract")
    with pytest.raises(SystemExit) as stop:
        main(task)()
    return stop.value.code


def test_jobs_of_a_multirun_are_composed_and_run_by_us(tmp_path, monkeypatch):
    names = (
        "Hydra's BasicSweeper.split_arguments, OverridesParser, load_sweep_config, Callbacks or "
        "the order of its callbacks"
    )
    with contract(names, "flash.compat.hydra.Multirun", "check and run all jobs itself"):
        from flash.compat.hydra import run_jobs_by

        seen = []

        def run(multirun):
            assert (multirun.choice("launcher"), multirun.choice("sweeper")) == ("basic", "basic")
            assert multirun.hydra_arguments[0] == "hydra.verbose=[x]"
            assert not any("sweep" in text for text in multirun.hydra_arguments)
            configs = [dict(job.config) for job in multirun.composed()]
            seen.extend(zip(multirun.jobs, configs, strict=True))

        run_jobs_by(run)
        arguments = ["seed=1,2", "size=range(3,5)", "hydra.verbose=[x]", "hydra.sweep.dir=x"]
        assert run_main(arguments, tmp_path, monkeypatch, pytest.fail) == 0
        assert seen == [
            ([f"seed={s}", f"size={n}"], {"seed": s, "size": n}) for s in (1, 2) for n in (3, 4)
        ]


def test_an_error_of_a_sweep_does_not_start_the_jobs(tmp_path, monkeypatch, capsys):
    with contract(
        "Hydra's order of callbacks", "flash.compat.hydra.RunJobs", "end before Hydra's launcher"
    ):
        from flash.compat.hydra import run_jobs_by

        def run(multirun):
            raise RuntimeError("a bug")

        run_jobs_by(run)
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # commands set their own
        assert run_main(["seed=1,2"], tmp_path, monkeypatch, pytest.fail) == 1
        assert "RuntimeError: a bug" in capsys.readouterr().err


def test_options_of_plugins_are_found():
    with contract(
        "Hydra's Plugins.instance or ConfigStore.repo",
        "flash.compat.hydra.plugin_option",
        "tell whether a launcher is installed",
    ):
        from flash.compat.hydra import plugin_option

        basic = plugin_option("hydra/launcher", "basic")
        assert basic is not None
        assert basic["_target_"].endswith("BasicLauncher")
        assert plugin_option("hydra/launcher", "none") is None
        assert plugin_option("no/group", "none") is None


def test_a_missing_option_is_named_with_the_existing_ones(tmp_path):
    with contract(
        "Hydra's MissingConfigException.missing_cfg_file or .options",
        "flash.compat.hydra.missing_option",
        "name the nearest option",
    ):
        from flash.compat.hydra import missing_option

        GlobalHydra.instance().clear()
        (tmp_path / "data").mkdir()
        for name in ("data/chat", "data/files", "root"):
            (tmp_path / f"{name}.yaml").write_text("x: 1\n")
        with (
            initialize_config_dir(str(tmp_path), version_base="1.3"),
            pytest.raises(MissingConfigException) as raised,
        ):
            compose("root", ["+data=chta"])
        assert missing_option(raised.value) == ("data/chta", ["chat", "files"])
        unknown = SimpleNamespace(missing_cfg_file=None, options=None)
        assert missing_option(unknown) == ("", None)
