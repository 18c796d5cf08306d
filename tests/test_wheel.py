"""An installed wheel, without the clone: every command composes, from any folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERBS = ("train", "search", "export", "evaluate", "prepare")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `flash` command of a fresh environment that holds our wheel.

    The environment borrows the dependencies, and nothing else, of the one that the tests run in.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("*.whl")
    environment = folder / "env"
    venv.create(environment)
    site = next(environment.glob("lib/python*/site-packages"))
    into = [*pip, "--python", str(environment / "bin" / "python"), "install", "--no-deps", wheel]
    subprocess.run(into, check=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return environment / "bin" / "flash"


def run(command: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished command, without the clone on Python's path."""
    hidden = ("PYTHONPATH", "FLASH_RUNS", "FLASH_PROGRAM", "FLASH_VERB")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [command, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_the_package_is_the_installed_one(installed, tmp_path):
    python = installed.with_name("python")
    code = "import flash.bundled as b; print(b.__file__, b.CONF)"
    said = run(python, tmp_path, "-c", code).stdout.split()
    assert [path.startswith(str(installed.parents[1])) for path in said] == [True, True]


@pytest.mark.parametrize("verb", VERBS)
def test_every_root_composes_in_an_empty_folder(installed, tmp_path, verb):
    done = run(installed, tmp_path, verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"flash {verb}" in done.stdout
    groups = done.stdout.partition("Settings:")[0]
    assert ("\n  device  " in groups) == (verb in {"search", "export", "evaluate"})
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    done = run(installed, tmp_path, verb, "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    assert f"weights: {installed.parents[1]}" in done.stdout  # not the clone's
    done = run(installed, tmp_path, verb, "seeed=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: seeed: unknown key")


def test_commands_are_listed_and_a_wrong_one_is_answered(installed, tmp_path):
    listed = run(installed, tmp_path)
    assert listed.returncode == 2
    others = ("measurements", "report", "workspace", "new")
    assert all(verb in listed.stdout for verb in (*VERBS, *others))
    wrong = run(installed, tmp_path, "searc")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: flash searc: no such command; did you mean 'search'?\n",
    )


def test_a_space_of_the_users_own_is_found(installed, tmp_path):
    made = run(installed, tmp_path, "new", "space", "mine")
    assert made.returncode == 0, made.stderr
    path = tmp_path / "conf" / "space" / "mine.yaml"
    path.write_text(path.read_text("utf-8").replace("max: 576", "max: 512"), "utf-8")
    done = run(installed, tmp_path, "search", "space=mine", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout
    assert "max: 512" in done.stdout
    again = run(installed, tmp_path, "new", "space", "mine")
    assert again.returncode == 2
    assert "conf/space/mine.yaml: exists" in again.stderr


def test_a_file_with_the_name_of_ours_is_refused(installed, tmp_path):
    folder = tmp_path / "conf" / "device"
    folder.mkdir(parents=True)
    (folder / "host.yaml").write_text("name: host\n", "utf-8")
    done = run(installed, tmp_path, "train", "--cfg", "job")
    assert done.returncode == 2
    assert "conf/device/host.yaml: device=host comes with flash" in done.stderr
