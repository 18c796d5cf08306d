"""Boards: measurements, keys and lost connections, on an sshd of our own."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flash.device.connections import SshSettings
from flash.device.factory import open_device
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.remote import content_name
from flash.device.settings import DeviceKind
from flash.device.ssh import WATCHDOG_SCRIPT, SshDevice
from flash.errors import DeviceError, InputError
from tests.device.boards import FOLDER, SSHD, Board, free_port, make_key

pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="needs Debian's openssh-server and openssh-client",
)


@pytest.fixture
def board(tmp_path):
    folder = tmp_path / "sshd"
    folder.mkdir()
    board = Board(folder)
    board.start()
    yield board
    board.stop()


@pytest.fixture
def connect(settings):
    """A function that opens a device on a board with changed settings."""

    def connect(board, link=None, **changes):
        changed = replace(settings, kind=DeviceKind.ssh, ssh=link or board.settings(), **changes)
        device = open_device(changed)
        assert isinstance(device, SshDevice)
        return device

    return connect


@pytest.fixture
def quick(board):
    """A stand-in for the runner's Python: it answers the probe and writes a result at once."""
    board.tool(
        "quick",
        'case "$2" in *importlib*) '
        'echo \'{"cpu": "c", "cores": 4, "system": "s", "runtime": "r", "no_huge_pages": ""}\';;'
        '*) shift 3; echo run >> "$0.log"; . "$0.before"; '
        'echo \'{"answers": [[7]]}\' > "$2";; esac\n',
    )
    (board.folder / "bin" / "quick.before").write_text("")
    return board


def runs(board):
    log = board.folder / "bin" / "quick.log"
    return len(log.read_text().split()) if log.exists() else 0


def test_board_measures_and_scores_as_the_host_does(board, connect, program, settings):
    device = connect(board, processes=1)
    named = [Program(name='it\'s a "b" $x', path=program, vocab_size=64)]
    [there] = device.measure(named, settings.workload)
    assert list(there.latencies) == ["prefill_20", "decode_30"]
    assert [len(process["prefill_20"]) for process in there.samples] == [2]
    assert there.prefill.ms > there.decode.ms > 0
    assert there.peak_rss_mib > there.model_rss_mib > 0
    text = [5, 9, 33, 2, 17, 40]
    scores = device.score(program, text, keep_logits=True)
    assert scores["logits"] == HostDevice(settings).score(program, text, keep_logits=True)["logits"]
    identity = device.identity()
    assert len(str(identity.pop("unit"))) == 12
    assert identity == {**HostDevice(settings).identity(), "cpus": ""}
    assert len(board.files) == 2  # the runner and the program, once each
    assert list((board.home / FOLDER / "jobs").iterdir()) == []


def test_damaged_program_is_refused_by_the_boards_runtime(board, connect, program, tmp_path):
    broken = tmp_path / "broken.pte"
    broken.write_bytes(program.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"broken\.pte: cannot be loaded .* device's executorch 1"):
        connect(board).generate(broken, [1], 1)


def test_unknown_and_changed_host_keys_are_told_apart(board, connect, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(InputError, match="known_hosts: the key of .* is not in it"):
        connect(board, board.settings(known_hosts=str(empty))).identity()
    board.know(make_key(tmp_path / "other"))
    with pytest.raises(InputError, match="known_hosts: .* shows another key"):
        connect(board).identity()


def test_wrong_user_key_is_one_clear_error(board, connect, tmp_path):
    key = make_key(tmp_path / "stranger")
    with pytest.raises(InputError, match=r"device\.ssh\.identity: .* refuses the key"):
        connect(board, board.settings(identity=str(key))).identity()
    with pytest.raises(InputError, match=r"device\.ssh\.identity=.*none: no such file"):
        connect(board, board.settings(identity=str(tmp_path / "none")))


def test_port_that_nobody_serves_is_an_error_after_retries(board, connect):
    link = board.settings(port=free_port(), retries=2)
    with pytest.raises(DeviceError, match=r"refused; gave up after 3 tries"):
        connect(board, link).identity()


def test_python_without_executorch_or_none_at_all(board, connect):
    with pytest.raises(InputError, match=r"device\.ssh\.python=no such: no such program"):
        connect(board, board.settings(python="no such")).identity()
    board.tool("bare", f'exec {sys.executable} -I -S "$@"\n')
    with pytest.raises(
        InputError, match=r"bare: has no executorch with torch on .* -m pip install"
    ):
        connect(board, board.settings(python="bare")).identity()


def test_more_threads_or_cpus_than_the_board_has(quick, connect):
    link = quick.settings(python="quick")
    with pytest.raises(InputError, match=r"device\.threads=5: expected 1 to the 4 cores of 127"):
        connect(quick, link, threads=5).identity()
    with pytest.raises(InputError, match=r"device\.cpus=\[4\]: expected 0 to 3 on 127"):
        connect(quick, link, cpus=[4]).identity()


def test_cut_push_goes_on_and_leaves_nothing_half(quick, connect, tmp_path, monkeypatch):
    data = tmp_path / "large.pte"
    data.write_bytes(os.urandom(3 << 20))
    monkeypatch.setattr("flash.device.ssh.RUNNER", data)  # so that it is the first to be sent
    # The first `cat` of a push stops after 1 MiB, then the connection is cut.
    quick.tool(
        "cat",
        'case "$(readlink /proc/$$/fd/1)" in *.part) if [ ! -e "$0.cut" ]; then touch "$0.cut"; '
        'head -c 1048576; sleep 60; fi;; esac; exec /bin/cat "$@"\n',
    )
    device = connect(quick, quick.settings(python="quick"))
    parts = quick.home / FOLDER / "files"

    def cutter():
        while not any(p.stat().st_size >= 1 << 20 for p in parts.glob("*.part")):
            time.sleep(0.01)
        quick.cut()

    thread = threading.Thread(target=cutter, daemon=True)
    thread.start()
    assert device.generate(data, [1], 1) == [7]
    thread.join()
    assert (quick.folder / "bin" / "cat.cut").exists()
    assert (parts / content_name(data)).read_bytes() == data.read_bytes()
    assert not list(parts.glob("*.part"))


def test_greetings_of_a_real_login_shell_are_no_answers(quick, connect, program):
    greets = "echo Welcome; printf 'no end'; trap 'echo bye' EXIT\n"
    for name in (".bashrc", ".bash_logout", ".profile"):
        (quick.home / name).write_text(greets)
    device = connect(quick, quick.settings(python="quick"))
    said = subprocess.run([*device._command, "true"], capture_output=True, text=True, check=True)
    assert said.stdout in {"", "Welcome\nno end", "Welcome\nno endbye\n"}  # as the shell has it
    assert device.identity()["cores"] == 4
    assert device.generate(program, [1], 1) == [7]


def test_damage_on_the_way_is_found_and_sent_again(quick, connect, tmp_path):
    data = tmp_path / "program.pte"
    data.write_bytes(b"right")
    device = connect(quick, quick.settings(python="quick"))
    part = quick.home / FOLDER / "files" / f"{content_name(data)}.{device._token}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"wro")  # what an interrupted push of other bytes would leave
    assert device.generate(data, [1], 1) == [7]
    assert (part.parent / content_name(data)).read_bytes() == b"right"
    assert not part.exists()


def test_cut_run_is_repeated_and_its_process_dies(board, connect, program):
    hangs = board.folder / "hangs.py"
    hangs.write_text("import time; time.sleep(60)")
    watch = board.folder / "watch.py"
    watch.write_text(WATCHDOG_SCRIPT)
    board.tool(
        "watched",  # the real Python, except that the first runner hangs
        f'case "$2" in *runpy*) if [ ! -e "$0.first" ]; then echo $$ > "$0.first"; '
        f"exec {sys.executable} {watch} {hangs}; fi;; esac\n"
        f'exec {sys.executable} "$@"\n',
    )
    mark = board.folder / "bin" / "watched.first"

    def cutter():
        while not (mark.exists() and mark.read_text().strip()):
            time.sleep(0.02)
        time.sleep(0.3)
        board.cut()

    thread = threading.Thread(target=cutter, daemon=True)
    thread.start()
    tokens = connect(board, board.settings(python="watched")).generate(program, [5, 9], 3)
    thread.join()
    assert len(tokens) == 3
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(mark.read_text())).wait(5)


def test_runner_that_fails_is_not_repeated(quick, connect, program):
    device = connect(quick, quick.settings(python="quick"))
    before = quick.folder / "bin" / "quick.before"
    before.write_text("echo boom >&2; exit 255\n")
    with pytest.raises(DeviceError, match=r"model\.pte: the runner exited with code 255: boom"):
        device.generate(program, [1], 1)
    before.write_text("kill -9 $$\n")
    with pytest.raises(DeviceError, match="memory was full"):
        device.generate(program, [1], 1)
    assert runs(quick) == 2
    before.write_text("sleep 60\n")
    device.settings.start_timeout_s = device.settings.run_timeout_s = 0.2
    with pytest.raises(DeviceError, match="no result after"):
        device.generate(program, [1], 1)
    assert runs(quick) == 3


def test_full_disk_is_one_clear_error(quick, connect, program):
    quick.tool("cat", 'echo "cat: write error: No space left on device" >&2; exit 1\n')
    with pytest.raises(DeviceError, match=r"storage is full; .*keep_mib"):
        connect(quick, quick.settings(python="quick")).generate(program, [1], 1)


def test_programs_unused_for_longest_make_room(quick, connect, tmp_path):
    device = connect(quick, quick.settings(python="quick", keep_mib=2))
    paths = []
    for i in range(4):
        path = tmp_path / f"{i}.pte"
        path.write_bytes(bytes([i]) * (1 << 20))
        paths.append(path)
    files = quick.home / FOLDER / "files"
    for age, path in zip((9000, 8000, 0), paths, strict=False):
        device.generate(path, [1], 1)
        used = time.time() - age
        os.utime(files / content_name(path), (used, used))
    device.generate(paths[3], [1], 1)
    kept = [path for path in paths if (files / content_name(path)).exists()]
    assert kept == [paths[2], paths[3]]


def test_shared_connection_ends_with_the_device(quick, connect):
    device = connect(quick, quick.settings(python="quick"))
    device.identity()
    control = Path(device._control)
    assert (control / "c").is_socket()
    del device
    assert not control.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("host", "-oProxyCommand=touch x"), ("host", ""), ("user", "a b"), ("port", 0),
     ("folder", "a\nb"), ("python", "-c"), ("retries", -1)],
)  # fmt: skip
def test_bad_values_are_named(key, value, settings):

    def connect():
        link = SshSettings(**{"host": "board", key: value})
        return SshDevice(replace(settings, kind=DeviceKind.ssh, ssh=link))

    with pytest.raises(InputError, match=rf"^(device\.ssh\.)?{key}="):
        connect()
