"""Boards and phones that answer oddly, behind stand-ins for `ssh` and `adb`."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from flash.device import answers, processes, system_info, thermal
from flash.device.connections import AndroidSettings, SshSettings
from flash.device.factory import open_device
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.processes import TooMuchOutput, run_bounded
from flash.device.remote import content_name
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.stock_runner import generate_text
from flash.errors import DeviceError, InputError
from tests.device.test_stock_runner import write_tokenizer
from tests.fuzz import boards
from tests.fuzz.boards import RESULT, STATISTICS, Board


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that identifies and measures a stand-in board, or a phone."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr("flash.device.android.POLL_S", 0.01)
    monkeypatch.setattr(processes, "LARGEST_OUTPUT", 4 << 20)

    def measure(board, *, phone=False, **link):
        boards.set_up(tmp_path, board)
        settings = boards.settings(tmp_path, phone=phone, **link)
        device = open_device(settings)
        program = Program(name="a", path=tmp_path / "a.pte", vocab_size=64)
        [result] = device.measure([program], settings.workload)
        return device.identity(), result

    return measure


@pytest.mark.parametrize("phone", [False, True])
@pytest.mark.parametrize(
    ("before", "behind"),
    [("Welcome!\n", ""), ("", "bye\n"), ("no end", "\x1b[0m"), ('{"cpu": 1}\n', "7\n"),
     ("\r\n\0\xff", "\nflash-exit:0:1\n")],
)  # fmt: skip
def test_greetings_of_a_login_shell_are_no_answers(measure, phone, before, behind):
    plan = {"when": "flash-begin", "way": "greets", "before": before, "behind": behind}
    identity, result = measure(Board(plan), phone=phone)
    assert identity["cores"] == 8
    assert identity["cpu"] == ("SM1" if phone else "Board (asimdhp)")
    assert result.decode.ms == (10 if phone else 40)


def test_a_python_that_greets_too(measure):
    probe = b"site loaded\n" + json.dumps(boards.PROBE).encode() + b"\nbye\n"
    assert measure(Board(answers={"probe": probe}))[0]["cores"] == 8


def test_an_answer_of_another_command_is_none(measure):
    """It has a mark too, but not that of the question."""
    plan = {"when": "importlib", "way": "refused", "code": 255, "text": "gone"}
    old = "\nflash-begin:0123456789abcdef\n{}\nflash-exit:0123456789abcdef:0\n"
    with pytest.raises(DeviceError, match=r"board: connection failed: gone; gave up after 2"):
        measure(Board(plan))
    plan = {"when": "importlib", "way": "greets", "before": old, "behind": old}
    assert measure(Board(plan))[0]["cores"] == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("probe", b'{"cpu": "x"', "not JSON"),
        ("probe", b"", "not JSON"),
        ("probe", json.dumps({**boards.PROBE, "cores": "8"}).encode(), 'cores="8": input should'),
        ("probe", json.dumps({**boards.PROBE, "cores": 0}).encode(), "cores=0: expected 1 to 4096"),
        ("probe", json.dumps({**boards.PROBE, "cpu": "\x1b[1m"}).encode(), r"cpu=\\x1b\[1m: exp"),
        (
            "result",
            json.dumps(RESULT).encode()[:-30],
            "a: the device answers with nonsense",
        ),
        ("result", b'{"samples": {}}', "started: missing"),
        ("result", json.dumps({**RESULT, "samples": {}}).encode(), "0 samples of prefill_8 of a"),
        ("result", json.dumps({**RESULT, "load_ms": {"a": None}}).encode(), r"load_ms\.a=null"),
    ],
)
def test_damaged_answers_are_one_line(measure, name, content, message):
    with pytest.raises(DeviceError, match=message) as caught:
        measure(Board(answers={name: content}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def result_of(times):
    """Result of a board with these times of a prefill and of a decode step."""
    run = {**boards.RUN, "wall_s": times[0]}
    samples = {"prefill_8": [run], "decode_8": [{**boards.RUN, "steps_ms": [times[1], 40.0]}]}
    return Board(answers={"result": json.dumps({**RESULT, "samples": {"a": samples}}).encode()})


@pytest.mark.parametrize("times", [(-3.0, 40.0), (0.0, 40.0), (0.2, -1.0), (float("nan"), 40.0)])
def test_a_clock_that_jumps_back_gives_no_times(measure, times):
    with pytest.raises(DeviceError, match=r"times of \w+_8 of a: .*: expected above 0; its clock"):
        measure(result_of(times))


def test_a_clock_that_jumps_ahead_or_runs_fast_gives_no_times(measure):
    with pytest.raises(DeviceError, match=r"clock says 3.6e\+03 s, but .* s have passed here"):
        measure(result_of((3600.0, 40.0)))
    answers.check_clock(10.0, 9.0, "a")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("{}", "prompt_tokens: missing"),
        (json.dumps({**STATISTICS, "prompt_eval_end_ms": 1}), "expected at least .* has jumped"),
        (json.dumps({**STATISTICS, "inference_end_ms": None}), "inference_end_ms=null"),
        (json.dumps({**STATISTICS, "SCALING_FACTOR_UNITS_PER_SECOND": 0}), "=0: expected 1 or m"),
        (json.dumps({**STATISTICS, "inference_end_ms": 1_700_000_600_000}), "clock says 600 s"),
    ],
)
def test_damaged_statistics_of_a_phone_are_one_line(measure, line, message):
    board = Board(answers={"statistics": f"text\nPyTorchObserver {line}\n".encode()})
    with pytest.raises(DeviceError, match=f"^a: .*{message}"):
        measure(board, phone=True)


def test_a_phone_without_properties_is_named(measure):
    with pytest.raises(DeviceError, match=r"phone R1 \(2\): has no build fingerprint"):
        measure(Board(answers={"properties": b""}), phone=True)


@pytest.mark.parametrize(("phone", "when"), [(False, "importlib"), (True, "getprop")])
def test_endless_output_is_ended(measure, phone, when):
    with pytest.raises(DeviceError, match=r"was ended, as it printed over 4 MiB; see what prints"):
        measure(Board({"when": when, "way": "floods"}), phone=phone)


def test_a_process_that_prints_too_much_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "LARGEST_OUTPUT", 1 << 20)
    began = time.monotonic()
    endless = [sys.executable, "-c", "while True: print('y' * 100)"]
    with pytest.raises(TooMuchOutput, match="printed over 1 MiB"):
        run_bounded(endless, 60.0)
    assert time.monotonic() - began < 30
    with pytest.raises(InputError, match="cannot be run"):
        run_bounded(["/"], 60.0)


@pytest.mark.parametrize(
    ("tool", "text", "message"),
    [
        ("mkdir", "Read-only file system", r"folder x y cannot be written .* device\.ssh\.folder"),
        ("sha256sum", "sha256sum: not found", "exit code 127: sha256sum: not found"),
        ("cat", "No space left on device", "storage is full"),
    ],
)
def test_what_a_board_cannot_do_is_one_line(measure, tool, text, message):
    with pytest.raises(DeviceError, match=message):
        measure(Board(tools={tool: f"/bin/cat > /dev/null; echo '{text}' >&2; exit 127\n"}))


def test_answers_that_are_no_numbers(measure):
    with pytest.raises(DeviceError, match=r"board: expected a number, answers 'x'"):
        measure(Board(tools={"date": "echo x\n"}))


def test_a_shell_that_runs_no_commands_is_not_asked_again(measure, tmp_path):
    plan = {"when": "importlib", "way": "refused", "code": 1, "text": "No account"}
    with pytest.raises(DeviceError, match=r"login shell runs no commands \(exit code 1: No acc"):
        measure(Board(plan))
    assert (tmp_path / "said").read_text() == "x"


def test_a_file_that_lost_its_content_is_sent_again(measure, tmp_path):
    measure(Board())
    [there] = (tmp_path / "board" / "x y" / "files").glob("*.pte")
    there.write_bytes(b"")
    measure(Board())
    assert there.read_bytes() == (tmp_path / "a.pte").read_bytes()


def test_files_from_a_time_to_come_are_removed_too(measure, tmp_path):
    """A board without a battery starts in the past."""
    files = tmp_path / "board" / "x y" / "files"
    files.mkdir(parents=True)
    old = files / "old.pte"
    old.write_bytes(b"x")
    os.utime(old, (time.time() + 10**6, time.time() + 10**6))
    measure(Board(), keep_mib=0)
    assert not old.exists()


@pytest.mark.parametrize(
    ("value", "celsius", "unit"),
    [
        (33000, 33, "thousandths of a degree"),
        (331, 33.1, "tenths of a degree"),
        (33, 33, "degrees"),
        (61, 61, "degrees"),
        (117000, 117, "thousandths of a degree"),
        (1200, 120, "tenths of a degree"),
    ],
)
def test_units_of_thermal_zones_are_told_by_plausibility(value, celsius, unit):
    zone = "/sys/class/thermal/thermal_zone"
    reading = thermal.parse(f"{zone}0/type:skin\n{zone}0/temp:{value}\n")
    assert (reading.celsius, reading.unit) == (pytest.approx(celsius), unit)


@pytest.mark.parametrize("value", ["0", "-273000", "255000", "-1", "2147483647", "9" * 5000, "x"])
def test_zones_that_report_nonsense_are_ignored(value):
    zone = "/sys/class/thermal/thermal_zone"
    text = f"{zone}0/type:skin\n{zone}0/temp:{value}\n"
    assert thermal.parse(text).celsius is None
    both = thermal.parse(f"{text}{zone}1/type:battery\n{zone}1/temp:305\n")
    assert (both.sensor, both.celsius) == ("batt", 30.5)
    service = "Current temperatures from HAL:\n"
    service += "\tTemperature{mValue=0.0, mType=3, mName=SKIN, mStatus=0}\n"
    service += "\tTemperature{mValue=-, mType=3, mName=SKIN, mStatus=0}\n"
    assert thermal.parse(service + both.sensor).celsius is None


def test_a_phone_in_tenths_of_a_degree_is_waited_for(measure, caplog):
    caplog.set_level(logging.INFO)
    _, result = measure(Board(zones=[("battery", "301"), ("cpu", "0")]), phone=True)
    assert result.conditions[0]["before"]["celsius"] == 30.1
    said = "phone R1 (2): batt 30.1 C, read as tenths of a degree"
    assert [line for line in caplog.messages if "read as" in line] == [said]
    with pytest.raises(DeviceError, match=r"still warm after 0 s \(batt 52\.0 C"):
        measure(Board(zones=[("battery", "520")]), phone=True)


def test_a_phone_without_a_plausible_temperature_is_warned_of(measure, caplog):
    _, result = measure(Board(zones=[("skin", "0")]), phone=True)
    assert result.conditions[0]["before"]["celsius"] is None
    assert "no sensor shows a plausible temperature; it is not kept cool" in caplog.text


def test_names_of_a_users_files_are_no_words_of_a_shell(measure, tmp_path):
    odd = tmp_path / "llama.x;touch escaped $(touch escaped) y"
    assert content_name_of(odd) == content_name_of(tmp_path / "plain")
    _, result = measure(Board(), phone=True, runner=odd)
    assert result.decode.ms == 10
    assert not list(tmp_path.rglob("escaped"))


def content_name_of(path):
    path.write_bytes(b"x")
    return content_name(path)


@pytest.mark.parametrize("serial", ["R1 (2)", "adb-R5 (2)._adb-tls-connect._tcp", "[::1%lo]:5555"])
def test_serials_have_blanks_and_brackets(serial):
    settings = DeviceSettings(kind=DeviceKind.android, android=AndroidSettings(serial=serial))
    assert settings.android.serial == serial
    for bad in ("-x", " ", "a\tb", ""):
        with pytest.raises(InputError, match=r"^serial=.*expected a serial number"):
            AndroidSettings(serial=bad)


@pytest.mark.parametrize("key", ["python", "folder"])
def test_a_tilde_is_not_expanded_on_a_board(key):
    with pytest.raises(InputError, match=rf"^{key}='~/x': expected a path from the home folder"):
        replace(SshSettings(host="b"), **{key: "~/x"})


def test_a_mask_of_cpus_belongs_to_the_hosts_identity(settings, monkeypatch):
    def identity(own, everything, **changes):
        monkeypatch.setattr("flash.device.settings._own_cpus", lambda: own)
        monkeypatch.setattr("flash.device.settings._all_cpus", lambda: everything)
        return HostDevice(replace(settings, **changes)).identity()["cpus"]

    assert identity([0, 1, 2, 3], [0, 1, 2, 3]) == ""
    assert identity([4, 9], [4, 9]) == ""  # a container
    assert identity([1], [0, 1, 2, 3]) == "1"
    assert identity([1, 2, 3], [0, 1, 2, 3], threads=2) == "2,3"
    assert identity([0, 1, 2, 3], [0, 1, 2, 3], cpus=[1]) == "1"
    assert identity([1, 2], [0, 1, 2, 3], cpus=[1]) == "1"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_taskset_changes_the_identity():
    code = (
        "from flash.device.host import HostDevice\n"
        "from flash.device.settings import DeviceSettings\n"
        "device = HostDevice(DeviceSettings())\n"
        "print(device.identity()['cpus'], device.settings.pinned)"
    )
    cpu = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(cpu), sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{cpu} [{cpu}]\n"


def test_a_runner_without_statistics_is_one_line(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer.json")
    for text in ("text", "text\nPyTorchObserver {", "text\nPyTorchObserver 5"):
        monkeypatch.setattr("flash.device.host.run_process", lambda *_, text=text, **__: (text, ""))
        with pytest.raises(DeviceError, match=r"a\.pte: the device answers with nonsense"):
            generate_text(tmp_path / "a.pte", tmp_path / "tokenizer.json", "x", 1)


def test_a_host_whose_runner_ends_early_is_one_line(settings, program, monkeypatch, tmp_path):
    early = tmp_path / "early.py"
    early.write_text("")
    monkeypatch.setattr("flash.device.host.RUNNER", early)
    with pytest.raises(DeviceError, match=r"model\.pte: the runner ended without a result"):
        HostDevice(settings).generate(program, [1], 1)


def test_a_processor_of_bytes_that_are_no_text(monkeypatch, tmp_path):
    odd = tmp_path / "cpuinfo"
    odd.write_bytes(b"model name: Odd\nHardware: \xff\xfe\n")
    monkeypatch.setattr(system_info, "open", lambda _: odd.open(encoding="ascii"), raising=False)
    assert system_info.processor()
    assert system_info.board() == ""
