"""Facts about JSON records: values, hashes, damage, files that several processes write."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
from enum import Enum
from pathlib import Path

import pytest

from flash.errors import InputError
from flash.records import (
    JsonLines,
    digest,
    find_json,
    locked,
    plain,
    read_json,
    replacing,
    write_json,
)


class Kind(Enum):
    one = "first"


@dataclasses.dataclass
class Settings:
    kind: Kind
    path: Path
    sizes: tuple[int, ...]


@dataclasses.dataclass
class Count:
    count: int


def test_plain_values_are_those_that_json_gives_back():
    values = plain({"settings": Settings(Kind.one, Path("a/b"), (1, 2)), "none": None})
    expected = {"settings": {"kind": "first", "path": "a/b", "sizes": [1, 2]}, "none": None}
    assert values == expected
    with pytest.raises(TypeError, match="set is no JSON value"):
        plain({1})


def test_digests_stay_those_of_stored_results():
    values = {"b": [1, 2.5], "a": None}
    assert digest(values) == digest(dict(reversed(values.items()))) == "6b1d84977084473f"
    assert digest(values, 24).startswith(digest(values))
    assert digest(values, 32, compact=True) == "e57f5d37865437a82e1108bafb4e5213"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"count": "x"}', "null", "3"])
def test_any_malformed_content_is_one_line_with_a_remedy(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"result\.json: damaged \(.+\); delete it to try again"):
        read_json(path, Count, "try again")


def test_what_is_written_is_read_and_what_is_missing_is_none(tmp_path):
    path = tmp_path / "folder" / "result.json"
    assert find_json(path, dict, "try again") is None
    write_json(path, {"settings": Settings(Kind.one, Path("a"), ())})
    found = find_json(path, dict, "try again")
    assert found == {"settings": {"kind": "first", "path": "a", "sizes": []}}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, 1)

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "1\n"


WRITER = """
import os, sys, time
from pathlib import Path
from flash.records import unfinished
with unfinished(Path(sys.argv[1])) as path:
    path.write_bytes(bytes(1000))
    os.rename(path, path.with_name("of another name"))
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing a file beside `result.json`."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "other.ckpt")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path, writer, monkeypatch
):
    def names_after_a_write():
        monkeypatch.setattr("flash.records._cleaned", set())  # as in a new process
        write_json(tmp_path / "result.json", 1)
        return sorted(path.name for path in tmp_path.iterdir())

    (tmp_path / ".z.of-someone-else").touch()
    [left, mine, result] = names_after_a_write()
    assert left.startswith(".other.ckpt.")
    assert list((tmp_path / left).iterdir())
    writer.kill()
    writer.wait()
    assert names_after_a_write() == [mine, result] == [".z.of-someone-else", "result.json"]


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made = []
    lock = fcntl.flock

    def late(file, operation):
        if not made:
            made.extend(tmp_path.glob(".*"))
            os.unlink(made[0] / ".lock")
            made[0].rmdir()
        lock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    write_json(tmp_path / "result.json", 1)
    assert made
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def opened(path: Path) -> tuple[JsonLines, list]:
    """A file of JSON lines and what was read of it."""
    taken: list = []
    lines = JsonLines(path, lambda number, line: taken.append((number, json.loads(line))))
    lines.refresh()
    return lines, taken


def test_lines_of_two_processes_are_seen_by_both(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    (first, seen), (second, also_seen) = opened(path), opened(path)
    first.append(lambda: "a")
    second.append(lambda: len(also_seen))
    first.refresh()
    assert seen == also_seen == [(1, "a"), (2, 1)]


def test_a_torn_line_is_dropped_and_overwritten(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('"a"\n"b')
    lines, seen = opened(path)
    assert "dropped an incomplete last line of 2 bytes" in caplog.text
    lines.append(lambda: "c")
    assert seen == [(1, "a"), (2, "c")]
    assert path.read_text() == '"a"\n"c"\n'


def test_a_lock_has_one_holder_who_is_waited_for(tmp_path):
    path, waited, held = tmp_path / "folder" / "lock", threading.Event(), threading.Event()

    def wait():
        with locked(path, waited.set):
            held.set()

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waited.wait(10)
        assert not held.is_set()
    thread.join(10)
    assert held.is_set()


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []
    rows = JsonLines(path, lambda number, line: seen.append((number, line)))
    rows.append(lambda: {"a": 1})
    rows.append(lambda: {"a": 2})
    path.rename(tmp_path / "away.jsonl")
    rows.append(lambda: {"b": 3})
    assert path.read_bytes() == b'{"b":3}\n'
    assert seen[-1] == (1, b'{"b":3}')
