"""The terminal: help, completion, width of lines, Ctrl-C, readers that end, and what comes next."""

import dataclasses
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from flash import cli, progress
from flash.bundled import CONF
from flash.commands import begin, command, this_command
from flash.completion import SCRIPTS, complete
from flash.config import load, register, runs_in
from flash.config_reference import GROUPS, about_option
from flash.errors import InputError
from flash.help import EXAMPLES, groups, help_text, options
from flash.log_filters import LogFormatter
from flash.schemas import ROOTS
from flash.terminal import COLUMNS, table, wrap

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, and the command `flash`."""
    monkeypatch.chdir(tmp_path)
    for name in ("FLASH_PROGRAM", "FLASH_RUNS", "FLASH_VERB"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    return tmp_path


def started(folder: Path, *arguments: str, **kwargs) -> subprocess.Popen[str]:
    """`python -m flash`, just started in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "flash", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize("verb", ROOTS)
def test_the_first_screen_fits_and_names_every_group_and_setting(verb, folder):
    text = help_text(verb, ["--help"])
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert len(text.splitlines()) <= 60
    for group, option in groups(verb).items():
        listed = re.search(rf"^  \+?{group} ", text, re.MULTILINE) is not None
        assert listed == bool(options(verb, group))
        assert option is None or f"*{option}" in text
    for name in {field.name for field in dataclasses.fields(ROOTS[verb])} - groups(verb).keys():
        assert re.search(rf"^  {name}(=|\.KEY)", text, re.MULTILINE), name


@pytest.mark.parametrize("verb", ROOTS)
def test_help_on_a_group_explains_all_its_options_and_settings(verb, folder):
    for group in groups(verb):
        text = help_text(verb, ["--help", group])
        assert max(map(len, text.splitlines())) <= COLUMNS
        for name in options(verb, group):
            assert re.search(rf"^ [ *]{name}\b", text, re.MULTILINE)
    assert "recipe.lr=0.0015  (float)\n      Peak learning rate." in help_text("train", ["recipe"])
    assert "recipe.lr=5e-05" in help_text("train", ["recipe=qat", "--help", "recipe"])
    nested = help_text("search", ["--help", "device.lowering"])
    assert "device.lowering.group_size=32" in nested
    assert "device.threads" not in nested
    assert "Seed of" in help_text("train", ["--help", "seed"])


def test_every_option_has_a_comment():
    paths = [path for group in GROUPS for path in (CONF / group).glob("*.yaml")]
    assert [path for path in paths if not about_option(path)] == []


@pytest.mark.parametrize(
    ("topic", "message"),
    [
        ("recpe", "did you mean 'recipe'"),
        ("recipe.lrr", "did you mean 'recipe.lr'"),
        ("device", "it is one of flash search, export"),
    ],
)
def test_help_on_what_is_not_there_names_the_nearest(topic, message, folder):
    with pytest.raises(InputError, match=re.escape(message)):
        help_text("train", ["--help", topic])


def test_only_usable_options_are_listed(folder):
    assert "gemma3_1b" not in options("train", "arch")
    assert "gemma3_1b" in options("export", "arch")
    assert list(options("train", "experiment")) == ["paper", "smollm2", "tiny_backbone"]
    assert list(options("export", "experiment")) == ["smollm2", "table6"]
    assert list(options("search", "experiment")) == ["paper", "smollm2"]


@pytest.mark.parametrize(
    ("verb", "words"), [(verb, words) for verb in EXAMPLES for words, _ in EXAMPLES[verb]]
)
def test_examples_of_help_compose(verb, words, folder):
    (folder / "conf" / "arch").mkdir(parents=True)
    overrides = [
        re.sub(r"^(\+arch=\w+),\w+$", r"\1", word).replace("range(0,16)", "0")
        for typed in shlex.split(words)
        for word in cli.each_device(verb, typed)
        if word != "-m" and not word.startswith("hydra/")
    ]
    for word in overrides:
        name = word.removeprefix("+arch=")
        if name != word and not (CONF / "arch" / f"{name}.yaml").is_file():
            (folder / "conf" / "arch" / f"{name}.yaml").write_text("ffn_dim: 192\n", "utf-8")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        load(compose(verb, overrides), ROOTS[verb])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sea", "search"),
        ("train rec", "recipe. recipe="),
        ("train recipe=q", "recipe=qat"),
        ("train recipe.schedule=", "recipe.schedule=cosine recipe.schedule=wsd"),
        ("train recipe.qat=", "recipe.qat=false recipe.qat=true"),
        ("export device.low", "device.lowering."),
        ("export device.lowering.quant", "device.lowering.quantization="),
        ("export -m +arch=flash_350m,flash_6", "+arch=flash_350m,flash_650m"),
        ("train +arch=tiny_", "+arch=tiny_3_ab12"),
        ("export model=", "model=mine"),
        ("train --help spa", ""),
        ("search --help spa", "space"),
        ("new spa", "space"),
        ("completion b", "bash"),
        ("unknown x", ""),
    ],
)
def test_completion(words, expected, folder):
    found = folder / "runs" / "conf" / "arch" / "tiny_3_ab12.yaml"
    found.parent.mkdir(parents=True)
    found.write_text("ffn_dim: 192\n", "utf-8")
    (folder / "runs" / "models" / "mine").mkdir(parents=True)
    assert " ".join(complete(words.split(" "))) == expected


@pytest.mark.parametrize("shell", [shell for shell in SCRIPTS if shutil.which(shell)])
def test_scripts_are_of_the_shell(shell):
    subprocess.run([shell, "-n"], input=SCRIPTS[shell], text=True, check=True)


def test_bash_completes_what_follows_an_equals_sign(folder):
    """Bash takes '=' for the end of a word, so candidates must not repeat what is before it."""
    script = f"""{SCRIPTS["bash"]}
flash() {{ PYTHONPATH={ROOT} {sys.executable} -m flash "$@"; }}
compopt() {{ :; }}
COMP_LINE="flash train recipe=q" COMP_POINT=20 COMP_WORDBREAKS="= "
_flash
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "qat\n", done.stderr


def test_commands_are_named_as_they_were_typed(monkeypatch, folder):
    for program, train, report in [
        ("/usr/bin/flash", "flash train", "flash report"),
        ("/x/flash/__main__.py", "python -m flash train", "python -m flash report"),
        ("train.py", "python train.py", "flash report"),
        ("../clone/train.py", "python ../clone/train.py", "flash report"),
    ]:
        monkeypatch.setattr(sys, "argv", [program, "name=a b"])
        begin("train")
        assert (command("train"), command("report")) == (train, report)
        assert this_command() == f"{train} 'name=a b'"


def test_ctrl_c_before_the_work_is_one_word(folder):
    check = (
        "import os, signal, sys\n"
        "from flash import terminal\n"
        "assert not {'logging', 'argparse', 'hydra'} & sys.modules.keys()\n"
        # Processes in the background begin with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "terminal.begin()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", check], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help", "recipe"], ["new", "-h"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_is_no_error(arguments, unbuffered, folder, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    readable, writable = os.pipe()
    os.close(readable)
    process = started(folder, *arguments, stdout=writable)
    os.close(writable)
    assert process.communicate(timeout=60)[1] == ""


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_on_a_full_disk_is_one_line(arguments, unbuffered, folder, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        process = started(folder, *arguments, stdout=full)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "No space left on device" in errors


def test_an_unknown_flag_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flash", "train", "--lr", "1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == (
        "error: --lr: no such flag; settings are written as KEY=VALUE, see flash train --help\n"
    )


@pytest.mark.parametrize(
    ("verb", "word", "words"),
    [
        ("search", "device=[a,b, c]", ["device=a", "+device@devices.b=b", "+device@devices.c=c"]),
        ("search", "device=[a]", ["device=a"]),
        ("export", "device=[a]", ["device=a"]),
        ("search", "device=a,b", ["device=a,b"]),
    ],
)
def test_a_list_of_devices_is_short_for_a_device_and_further_ones(verb, word, words):
    assert cli.each_device(verb, word) == words


@pytest.mark.parametrize(
    ("verb", "word"),
    [
        ("search", "device=[a,a]"),
        ("search", "device=[a,b,b]"),
        ("search", "device=[]"),
        ("search", "device=[a,]"),
        ("search", "device=[a,8gen2]"),
        ("search", "device=[a,b],[c,d]"),
        ("search", "device=a,[b,c]"),
        ("search", "device=[[a],b]"),
        ("export", "device=[a,b]"),
    ],
)
def test_lists_of_devices_that_make_no_sense_are_refused(verb, word):
    with pytest.raises(InputError, match=rf"^{re.escape(word)}: expected "):
        cli.each_device(verb, word)


@pytest.mark.parametrize("word", ["trainer=[1]", "+arch=[a,b]", "backbone=[null]"])
def test_a_list_of_options_of_a_group_is_refused(word):
    group = word.lstrip("+").partition("=")[0]
    message = rf"^{re.escape(word)}: expected the name of one option of {group}$"
    with pytest.raises(InputError, match=message):
        cli._check_words("train", [word])


@pytest.mark.parametrize("word", ["+x._target_=os.system", "-cp", "-cn", "--config-path"])
def test_words_that_would_run_other_code_are_refused(folder, monkeypatch, capsys, word):
    monkeypatch.setattr(sys, "argv", ["flash", "train", word, "x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    expected = "expected no _target_" if "_target_" in word else "no such flag"
    assert capsys.readouterr().err.startswith(f"error: {word}: {expected}")
    cli._check_words("train", ["runs=/data/on_target_runs"])


def test_a_folder_of_options_on_the_command_line_is_checked(folder, monkeypatch, capsys, tmp_path):
    hostile = tmp_path / "given" / "train" / "experiment" / "x.yaml"
    hostile.parent.mkdir(parents=True)
    hostile.write_text("hydra: {job_logging: null}\n", "utf-8")
    for words in (["--config-dir", str(tmp_path / "given")], [f"--config-dir={tmp_path}/given"]):
        monkeypatch.setattr(sys, "argv", ["flash", "train", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert "x.yaml: hydra: expected no setting of Hydra" in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_sleep_unless_told_otherwise(folder, monkeypatch, chosen, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["flash", "train", "--lr"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == policy


def test_new_says_what_it_made_and_what_comes_next(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flash", "new", "data", "mine"])
    assert cli.main() == 0
    out = capsys.readouterr().out
    assert "made: conf/data/mine.yaml" in out
    assert "next: flash train data=mine\n" in out
    words = ["flash", "new", "search/experiment", "mine", "--from", "paper"]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 0
    assert "next: flash search experiment=mine\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["flash", "new", "space", "\\1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "expected a name of letters" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["flash", "new", "space", "z", "--backbone", "NAME"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: --backbone NAME: expected a Hugging Face folder" in capsys.readouterr().err


def test_wide_tables_go_on_in_a_further_table():
    header = ["name", *(f"a long title {i}" for i in range(9))]
    rows = [["first", *map(str, range(9))], ["second", *map(str, range(9))]]
    parts = table([header, *rows]).split("\n\n")
    assert len(parts) == 3
    for part in parts:
        lines = part.splitlines()
        assert max(map(len, lines)) <= COLUMNS
        assert [line.split()[0] for line in lines] == ["name", "first", "second"]


def test_log_lines_are_wrapped_on_a_terminal_only(monkeypatch):
    record = logging.makeLogRecord({"msg": "word " * 30})
    assert "\n" not in LogFormatter().format(record)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    lines = LogFormatter().format(record).splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert wrap("a/path/that/is/too/long b", width=10) == "a/path/that/is/too/long\nb"


def test_stages_are_lines_with_their_times(capsys):
    with progress.stages("x: lowering"):
        progress.stage("export")
        progress.stage("file")
    assert capsys.readouterr().err == "x: lowering: export, 0 s\nx: lowering: file, 0 s\n"
    progress.stage("nobody listens")


def test_the_time_left_is_known_once_a_stage_has_ended(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    shown = progress._Stages("x", {"export": 0.2, "delegates": 0.7, "file": 0.1})
    shown.begin("rounding")
    now = 50.0  # not counted
    shown.begin("export")
    now = 55.0
    shown.count()
    now = 60.0
    shown.begin("delegates")
    now = 75.0
    shown.count()
    now = 95.0
    shown.begin("file")
    shown.count()
    now = 110.0
    shown.count()
    shown.end()
    assert capsys.readouterr().err.split("\r\x1b[K")[1:] == [
        "x: rounding, 50 s\n",
        "x: export, 5 s",
        "x: export, 10 s\n",
        "x: delegates, 15 s, about 25 s left",
        "x: delegates, 35 s\n",
        "x: file, 0 s, about 5 s left",
        "x: file, 15 s",  # longer than usual
        "x: file, 15 s\n",
    ]


def test_a_further_rank_runs_the_command_of_the_first(monkeypatch):
    """Lightning starts it as `flash seed=1`, with the program and what Hydra knows."""
    started = []
    monkeypatch.setattr("flash.cli.run", started.append)
    monkeypatch.setenv("FLASH_VERB", "train")
    monkeypatch.setattr(sys, "argv", ["flash", "seed=1"])
    assert cli.main() == 2  # the first rank: no such command
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main() == 0
    assert started == ["train"]
    assert sys.argv == ["flash", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [([], "runs"), (["runs='my runs'"], "my runs"), (["++runs=a", "seed=1"], "a")],
)
def test_the_folder_of_results_is_what_hydra_takes_it_for(arguments, runs):
    assert runs_in(arguments) == runs


@pytest.mark.parametrize("argument", ["runs=", "runs=null", "runs=[a]", "runs={a: 1}"])
def test_results_need_a_folder(argument):
    with pytest.raises(InputError, match=r"^runs=.*: expected the path of a folder"):
        runs_in([argument])


@pytest.mark.parametrize("argument", ["runs=a,b", "runs=${oc.env:HOME}/x"])
def test_all_jobs_have_one_folder_of_results(argument):
    with pytest.raises(InputError, match="expected one folder for all jobs"):
        runs_in([argument])
