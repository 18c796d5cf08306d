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
from hydra.experimental.callback import Callback

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


SEEN: list[dict] = []


class ReadJobs(Callback):
    """Callback that records the results of `jobs_of` before the first job."""

    def on_multirun_start(self, config, **kwargs):
        from flash.compat.hydra import jobs_of

        SEEN.extend(dict(job.config) for job in jobs_of(config))


def test_jobs_of_a_multirun_are_composed_before_the_first(tmp_path, monkeypatch):
    names = "Hydra's BasicSweeper.split_arguments, OverridesParser or load_sweep_config"
    with contract(names, "flash.compat.hydra.jobs_of", "check all jobs before the first"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        (tmp_path / "conf").mkdir()
        GlobalHydra.instance().clear()
        ConfigStore.instance().store(name="contract", node=Settings)
        callback = f"+hydra.callbacks.c._target_={__name__}.ReadJobs"
        arguments = ["x.py", "-m", "seed=1,2", "size=range(3,5)", callback]
        monkeypatch.setattr(sys, "argv", arguments)
        started = []
        SEEN.clear()
        main = hydra.main(
            version_base="1.3", config_path=str(tmp_path / "conf"), config_name="contract"
        )
        main(lambda config: started.append(dict(config)))()
        assert started == SEEN
        assert [{"seed": s, "size": n} for s in (1, 2) for n in (3, 4)] == SEEN


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
