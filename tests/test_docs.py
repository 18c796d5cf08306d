"""The documentation says what the code does: commands, settings, messages, and its own form."""

import argparse
import ast
import itertools
import os
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from flash import cli, config_reference
from flash.bundled import CONF
from flash.config import ROOTS, load, register
from flash.help import help_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
GENERATED = ROOT / "docs" / "configuration.md"
OTHER_PROGRAMS = {
    ".",  # sources a file in the shell
    "adb",
    "apt-get",
    "git",
    "hf",
    "optuna-dashboard",
    "pip",
    "pre-commit",
    "scancel",
    "ssh-copy-id",
    "ssh-keygen",
    "ssh-keyscan",
    "wandb",
}
"""Programs that are not ours; their commands are not checked."""
SCRIPTS = {"train.py", "search.py", "export.py"}
COLUMNS, COMMAND_COLUMNS, TABLE_COLUMNS, README_LINES = 100, 88, 6, 150
NAMES = {path: path.relative_to(ROOT).as_posix() for path in PAGES}


def fences(text: str) -> Iterator[tuple[str, list[str]]]:
    """Language and lines of every fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2].splitlines()


def outside(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def logical_lines(lines: list[str]) -> Iterator[list[str]]:
    """Words of each command; one goes on in the next line after a backslash or within quotes."""
    text = ""
    for line in lines:
        text += f"{line}\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError:  # a quotation is still open
            continue
        for end in re.finditer(r"\\\n", text):
            quoted = text.count("'", 0, end.start()) % 2
            assert not quoted, f"a shell keeps the backslash: {text}"
        text = ""
        if words:
            yield words[: words.index(">")] if ">" in words else words
    assert not text, f"unfinished command: {text}"


def block_commands() -> Iterator[tuple[str, list[str]]]:
    for path in PAGES:
        for language, lines in fences(path.read_text("utf-8")):
            if language in {"", "bash"}:
                yield from ((NAMES[path], words) for words in logical_lines(lines))


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    for path in PAGES:
        text = outside(path.read_text("utf-8"))
        for match in re.finditer(r"`((?:python|flash|make) [^`]+)`", text):
            yield NAMES[path], shlex.split(match[1], comments=True)


def inline_overrides() -> list[str]:
    """Overrides in sentences that stand alone and have no placeholder, such as `data=chat`."""
    found: dict[str, None] = {}
    for path in PAGES:
        if path.name == "CHANGELOG.md":  # which has keys of former versions
            continue
        for match in re.finditer(
            r"`('?\+{0,2}[a-z_][\w.@/]*=[^=`][^`]*)`", outside(path.read_text("utf-8"))
        ):
            typed = " ".join(match[1].split())
            if not re.search(r"\b[A-Z][A-Z_]*\b|\.\.\.|<", typed):
                found[typed] = None
    return [*found]


def unique(commands: Iterator[tuple[str, list[str]]]) -> list[object]:
    """Each command once, named by the page that has it first."""
    found = {tuple(words): page for page, words in commands}
    return [pytest.param(list(words), id=f"{page}: {' '.join(words)}")
            for words, page in found.items()]  # fmt: skip


def configured(words: list[str]) -> tuple[str, list[str]] | None:
    """Verb and overrides of a command that Hydra composes; None for any other."""
    match words:
        case ["python", script, *rest] if script.removesuffix(".py") in {
            "train",
            "search",
            "export",
        }:
            return script.removesuffix(".py"), rest
        case ["flash", verb, *rest] if verb in ROOTS:
            return verb, rest
    return None


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of the first jobs of a sweep."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [each.input_line or ""]
        for each in parsed
    ]
    yield from (list(job) for job in itertools.islice(itertools.product(*choices), 3))


def check_composes(verb: str, arguments: list[str], folder: Path) -> None:
    """Compose a command as it stands; architectures that a search would have found are made up."""
    if "--help" in arguments:
        assert help_text(verb, arguments)
        return
    arguments = [part for word in arguments for part in cli.each_device(verb, word)]
    overrides = [
        re.sub(r"\$\(cat runs/studies/(\w+)/winners\)", r"\1_2,\1_4", word)
        for word in arguments
        if word not in {"-m", "--cfg", "job"}
    ]
    found = folder / "conf" / "arch"
    found.mkdir(parents=True)
    for word in overrides:
        if word.startswith("+arch="):
            for name in word.removeprefix("+arch=").split(","):
                if not (CONF / "arch" / f"{name}.yaml").is_file():
                    (found / f"{name}.yaml").write_text("ffn_dim: 192\n", "utf-8")
    cli.new_option("space", "smol", "flash")  # as `flash new` would have proposed it
    board = folder / "conf" / "device" / "mine.yaml"
    board.parent.mkdir()
    board.write_text("defaults: [ssh, _self_]\nname: mine\nssh: {host: board}\n", "utf-8")
    os.environ["FLASH_VERB"] = verb  # which the fixture `folder` restores
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs(overrides) if "-m" in arguments else [overrides]:
            load(compose(verb, job), ROOTS[verb])


def check_parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """See that the parser of a subcommand takes the arguments, and do no more."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["flash", *arguments])
    with pytest.raises(Parsed):
        cli.main()


def check_own(words: list[str]) -> None:
    """See that what a command runs is there."""
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text("utf-8")
            for target in targets:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file()
        case ["flash", verb, *_]:
            assert verb in cli._COMMANDS
        case [program, *_]:
            assert (
                program.removeprefix(".venv/bin/") in OTHER_PROGRAMS | {"python"}
                or (ROOT / program).is_file()
            )


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working directory with the checkpoint that commands call FOLDER, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    monkeypatch.setenv("FLASH_VERB", "search")
    (tmp_path / "FOLDER").mkdir()
    shutil.copy(ROOT / "backbones" / "tiny" / "config.json", tmp_path / "FOLDER")
    return tmp_path


@pytest.mark.parametrize("words", unique(block_commands()))
def test_commands_of_blocks_are_commands(words, folder, monkeypatch):
    command = configured(words)
    if command is not None:
        check_composes(*command, folder)
    elif words[:2] == ["flash", "new"]:
        monkeypatch.setattr(sys, "argv", words)
        assert cli.main() == 0
    elif words[0] == "flash":
        check_parses(words[1:], monkeypatch)
    else:
        check_own(words)


@pytest.mark.parametrize("words", unique(inline_commands()))
def test_commands_in_sentences_are_commands(words, folder):
    command = configured(words)
    if command is not None:
        check_composes(*command, folder)
    else:
        check_own(words)


def test_overrides_in_sentences_compose(folder):
    """Each is one of a command that has its key; short names of settings are none."""
    option = folder / "conf" / "device" / "mine.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("defaults: [host, _self_]\nname: mine\n", "utf-8")
    register()
    tried, wrong = 0, {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for text in inline_overrides():
            words = shlex.split(text)
            keys = [re.split(r"[.=/@]", word.lstrip("+"))[0] for word in words]
            verbs = [v for v, root in ROOTS.items() if {*keys} <= {*typing.get_type_hints(root)}]
            tried += bool(verbs)
            errors = {verb: composition_error(verb, words) for verb in verbs}
            if errors and None not in errors.values():
                wrong[text] = errors
    assert not wrong
    assert tried > 60


def composition_error(verb: str, words: list[str]) -> str | None:
    """Error with which Hydra refuses the overrides of a command; None if it takes them."""
    os.environ["FLASH_VERB"] = verb  # which the fixture `folder` restores
    try:
        compose(verb, [part for word in words for part in cli.each_device(verb, word)])
    except HydraException as error:
        return str(error)
    return None


def yaml_blocks() -> list[object]:
    """Options of one's own that the guides show, each with its config group."""
    found = []
    for group, page in (("device", "devices"), ("data", "data")):
        text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
        blocks = [lines for language, lines in fences(text) if language == "yaml"]
        found += [pytest.param(group, "\n".join(lines), id=lines[0]) for lines in blocks]
    return found


@pytest.mark.parametrize(("group", "text"), yaml_blocks())
def test_options_of_the_guides_compose(group, text, folder):
    own = folder / "conf" / group
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(text, "utf-8")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = load(compose("search", [f"{group}=mine"]), ROOTS["search"])
    assert getattr(settings, group).name == "mine"


def test_every_setting_is_documented():
    assert config_reference.undocumented() == []


def test_the_reference_is_current():
    assert GENERATED.read_text("utf-8") == config_reference.reference(), "run `make reference`"


@cache
def literals() -> list[str]:
    """Every string of the source; of an f-string, the parts between its values."""
    trees = (ast.parse(path.read_text("utf-8")) for path in (ROOT / "flash").rglob("*.py"))
    return [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def messages() -> list[str]:
    """Messages that the page of failures quotes: the beginning of each item of a list."""
    text = (ROOT / "docs" / "faq.md").read_text("utf-8")
    return [" ".join(each.split()) for each in re.findall(r"^- `([^`]+)`", text, re.MULTILINE)]


@cache
def setting_keys() -> set[str]:
    """Every key of the reference."""
    return set(re.findall(r"^- `([^`]+)` \(", GENERATED.read_text("utf-8"), re.MULTILINE))


def test_the_page_of_failures_quotes_messages():
    assert len(messages()) > 40


@pytest.mark.parametrize("message", messages())
def test_quoted_messages_are_in_the_source(message):
    found, keys = literals(), setting_keys()
    for part in message.split("..."):
        # `require` puts a key in front of its rule, and "expected" between the two.
        words = part.strip(" =:;,.()").removeprefix("expected ")
        said = any(words in literal for literal in found)
        assert said or words in keys, f"{words!r} is in no string of flash/"


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_pages_have_a_readable_form(path):
    text = path.read_text("utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        assert len(line) <= COLUMNS or "](http" in line, f"line {number}: {len(line)} columns"
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert columns <= TABLE_COLUMNS, f"line {number}: {columns} columns of a table"
    for language, lines in fences(text):
        if language in {"", "bash"}:
            assert max(map(len, lines)) <= COMMAND_COLUMNS, max(lines, key=len)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", outside(path.read_text("utf-8"))):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_files_that_are_named_exist(path):
    text = outside(path.read_text("utf-8"))
    for name in re.findall(r"`((?:flash|tests|benchmarks|scripts|backbones)/[\w./]+)`", text):
        assert (ROOT / name).exists() or "mine" in name, name


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in navigation
