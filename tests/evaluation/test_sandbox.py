"""The sandbox of code that a model writes: what passes, and what it cannot reach."""

import shutil
import socket
import time
from pathlib import Path

import pytest

from flash.errors import InputError
from flash.evaluation import sandbox
from flash.evaluation.sandbox import check_sandbox, passes
from flash.evaluation.sandboxed_tasks import code
from tests.evaluation.conftest import PROBLEM

installed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@installed
@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("print(1)", True),
        ("assert 1 == 2", False),
        ("def f(:", False),
        ("exit()", False),
        ("import os; os._exit(0)", False),
        ("raise SystemExit", False),
        ("x = '\ud83d'", False),
        ("a = bytearray(4 << 30)", False),
        ("import numpy; numpy.zeros(3)", True),
        ("open('a', 'w').write('b'); assert open('a').read() == 'b'", True),
        ("open('a', 'wb').write(bytes(64 << 20))", False),
        ("import tempfile; tempfile.TemporaryFile().write(b'x')", True),
    ],
)
def test_a_program_passes_that_comes_to_its_end(program, right):
    assert passes(program) is right


@installed
def test_a_program_cannot_reach_network_files_or_processes(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("x")
    monkeypatch.setenv("FLASH_SECRET", "x")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
    assert not passes(f"open({str(secret)!r})")
    assert not passes(f"open({str(Path.home() / '.profile')!r})")
    assert not passes("open('/usr/flash_was_here', 'w')")
    assert not passes("import os; os.environ['FLASH_SECRET']")
    assert passes("import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) < 4")
    assert not Path("/usr/flash_was_here").exists()


@installed
def test_a_program_that_does_not_end_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(sandbox, "TIMEOUT_S", 1.0)
    started = time.monotonic()
    assert not passes(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "time.sleep(60)"
    )
    assert time.monotonic() - started < 10


def test_a_machine_without_bubblewrap_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    check_sandbox.cache_clear()
    with pytest.raises(InputError, match=r"bubblewrap \(bwrap: not installed\); expected Linux"):
        check_sandbox()


@installed
def test_code_is_scored_by_its_tests():
    check_sandbox.cache_clear()
    assert code.completion(PROBLEM, [PROBLEM["canonical_solution"]]) == {"pass@1": 1.0}
    assert code.completion(PROBLEM, ["    return a - b\n"]) == {"pass@1": 0.0}
    assert code.answer(PROBLEM, ["    return a + b\n```\nThis adds them."]) == {"pass@1": 1.0}
