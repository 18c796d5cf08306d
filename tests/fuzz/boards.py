"""Boards and phones that answer oddly: stand-ins for the programs `ssh` and `adb`."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from flash import crash
from flash.arch import Quantization
from flash.config import one_line_errors
from flash.device import android, processes, remote
from flash.device.connections import AndroidSettings, SshSettings
from flash.device.factory import open_device
from flash.device.measurement import Program
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Workload
from flash.lowering.settings import LoweringSettings
from tests.device.test_stock_runner import write_tokenizer
from tests.fuzz.attempt import Attempt
from tests.fuzz.mutate import byte_changes, json_changes, to_json

ROOT = Path(__file__).parents[2]
# Runs the command in the folder `board`, and spoils its answer as plan.json says.
_CLIENT = f"""#!{sys.executable} -IS
import json, os, re, subprocess, sys, time
from itertools import islice
from pathlib import Path
from random import Random
sys.path.insert(0, {str(ROOT)!r})
from tests.fuzz.mutate import byte_changes

work = Path(__file__).parents[1]
plan = json.loads((work / "plan.json").read_text())
words = sys.argv[1:]
phone = Path(sys.argv[0]).name == "adb"
if "-O" in words or words[:1] in (["connect"], ["disconnect"]):
    sys.exit()
board = work / "board"
script = words[-1].replace("/sys/", f"{{board}}/sys/") if phone else words[-1]
if words[-1] == "devices":
    script = "cat " + str(board / "devices")
elif "push" in words:
    script = f"cp '{{words[-2]}}' '{{words[-1]}}'"
said = work / "said"
matches = re.search(plan.get("when", "$."), script, re.DOTALL)
if matches:
    with said.open("a") as file:
        file.write("x")
spoiled = matches and said.stat().st_size in range(plan.get("first", 1), plan.get("last", 999) + 1)
way = plan.get("way", "") if spoiled else ""
if way == "refused":
    print(plan["text"], file=sys.stderr)
    sys.exit(plan["code"])
if way == "hangs":
    time.sleep(60)
if way == "floods":
    while True:
        os.write(1, b"y" * 65536)
environment = {{"PATH": f"{{board}}/bin:/usr/bin:/bin", "HOME": str(board)}}
ran = subprocess.run(["sh", "-c", script], cwd=board, env=environment, stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)
out, code = ran.stdout, ran.returncode
if way == "greets":
    out = plan["before"].encode("latin-1") + out + plan["behind"].encode("latin-1")
if way == "bytes":
    changes = byte_changes(out, Random(plan["seed"]))
    out = next(islice((each for _, each in changes if each is not None), plan["skip"], None))
if way == "cut":
    out, code = out[: int(len(out) * plan["part"])], plan["code"]
os.write(2, ran.stderr)
sys.stdout.buffer.write(out)
sys.exit(code)
"""
_PYTHON = """#!/bin/sh
PATH=/bin
case "$2" in
*importlib*) cat answers/probe; exit $(cat answers/probe_code);;
esac
shift 3
cat answers/errors >&2
case "$(cat "$1")" in *generate*) cp answers/continued "$2";; *) cp answers/result "$2";; esac
exit $(cat answers/code)
"""
_LLAMA_MAIN = """#!/bin/sh
PATH=/bin
cd "$HOME/answers"
cat errors >&2
[ "$(cat code)" = 0 ] && cat statistics
exit $(cat code)
"""
_GETPROP = '#!/bin/sh\nPATH=/bin; grep "^$1=" answers/properties | cut -d= -f2-\n'
PROBE = {"cpu": "Board (asimdhp)", "cores": 8, "system": "Linux aarch64"}
PROBE |= {"runtime": "executorch 1.5.1", "no_huge_pages": ""}
RUN = {"wall_s": 0.2, "user_s": 0.2, "system_s": 0.0, "others_s": 0.1, "steal_ticks": 0}
RESULT: dict[str, Any] = {
    "started": 1.8e9,
    "start_ms": 900.0,
    "runtime": "executorch 1.5.1",
    "baseline_rss_kib": 200_000,
    "load_ms": {"a": 40.0},
    "load_rss_kib": {"a": 10_000},
    "samples": {"a": {"prefill_8": [RUN], "decode_8": [{**RUN, "steps_ms": [40.0, 50.0]}]}},
    "peak_rss_kib": 300_000,
    "load_average": 0.5,
    "process": RUN,
}
STATISTICS = {
    "prompt_tokens": 8,
    "generated_tokens": 2,
    "model_load_start_ms": 1_700_000_000_000,
    "model_load_end_ms": 1_700_000_000_040,
    "inference_start_ms": 1_700_000_000_050,
    "prompt_eval_end_ms": 1_700_000_000_060,
    "first_token_ms": 1_700_000_000_060,
    "inference_end_ms": 1_700_000_000_080,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000,
}
PROPERTIES = {
    "ro.product.model": "Fake",
    "ro.soc.model": "SM1",
    "ro.board.platform": "plain",
    "ro.build.fingerprint": "maker/product/device:15/AP3A.1/S931:user/release-keys",
    "ro.serialno": "R1",
}
_LOGGED = "PyTorchObserver "


@dataclass
class Board:
    """A stand-in device.

    Attributes:
        plan: Commands whose answers the client spoils, and how.
        answers: Files that the programs of the board print.
        tools: Programs that take the place of the board's own, by name.
        zones: Type and value of the thermal zones.
        harmless: Whether the measurement must succeed with the true values.
    """

    plan: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    zones: list[tuple[str, str]] = field(default_factory=lambda: [("skin", "33000")])
    harmless: bool = False


def set_up(work: Path, board: Board) -> None:
    answers = {
        "probe": to_json(PROBE) + b"\n",
        "result": to_json(RESULT),
        "continued": to_json({"answers": [[3]]}),
        "statistics": f"text\n{_LOGGED}{json.dumps(STATISTICS)}\n".encode(),
        "properties": "".join(f"{key}={value}\n" for key, value in PROPERTIES.items()).encode(),
        "errors": b"",
        "code": b"0",
        "probe_code": b"0",
        "service": b"",
        **board.answers,
    }
    tools = board.tools.items()
    files: dict[str, bytes] = {
        "bin/ssh": _CLIENT.encode(),
        "bin/adb": _CLIENT.encode(),
        "plan.json": to_json(board.plan),
        "board/bin/python3": _PYTHON.encode(),
        "board/bin/getprop": _GETPROP.encode(),
        "board/bin/dumpsys": b"#!/bin/sh\ncat answers/service\n",
        "board/devices": b"List of devices attached\nR1 (2)\tdevice\n\n",
        "board/sys/devices/system/cpu/possible": b"0-7\n",
        "a.pte": b"program" * 1000,
        "llama_main": _LLAMA_MAIN.encode(),
        **{f"board/answers/{name}": content for name, content in answers.items()},
        **{f"board/bin/{name}": f"#!/bin/sh\n{text}".encode() for name, text in tools},
    }
    for i, (kind, value) in enumerate(board.zones):
        zone = f"board/sys/class/thermal/thermal_zone{i}"
        files |= {f"{zone}/type": f"{kind}\n".encode(), f"{zone}/temp": f"{value}\n".encode()}
    for name, content in files.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if path.parent.name == "bin":
            path.chmod(0o755)
    write_tokenizer(work / "tokenizer.json")


def settings(work: Path, *, phone: bool, runner: Path | None = None, **link: Any) -> DeviceSettings:
    """Settings of the stand-in in a folder.

    Args:
        work: Folder that `set_up` has filled.
        phone: Whether it is a phone.
        runner: File of llama_main; None is that of `set_up`.
        link: More settings of the connection.
    """
    if runner is not None:
        runner.write_text(_LLAMA_MAIN, "utf-8")
    common: dict[str, Any] = {"retries": 1, "backoff_s": 0.0, **link}
    return DeviceSettings(
        kind=DeviceKind.android if phone else DeviceKind.ssh,
        ssh=SshSettings(host="board", folder="x y", **common),
        android=AndroidSettings(
            serial="R1 (2)",
            runner=str(runner or work / "llama_main"),
            tokenizer=str(work / "tokenizer.json"),
            folder=f"{work}/board/x y",
            reconnect_timeout_s=0.5,
            cool_timeout_s=0.2,
            **common,
        ),
        processes=1,
        runs=1,
        start_timeout_s=2.0,
        run_timeout_s=0.5,
        lowering=LoweringSettings(quantization=Quantization.fp32, max_context=64),
        workload=Workload(prompts=[8], contexts=[8], decode_tokens=2),
    )


def _measure(phone: bool, harmless: bool) -> Callable[[], int]:
    """Main function: identify and measure, and print both."""

    def main() -> int:
        crash.install()
        here = Path.cwd()
        os.environ["PATH"] = f"{here}/bin:{os.environ['PATH']}"
        android.POLL_S = 0.01
        defaults = remote.RemoteDevice._shell.__kwdefaults__
        assert defaults is not None
        # Where all must succeed, a busy machine shall not look like a fault.
        limit_s = 30.0 if harmless else 3.0
        defaults["timeout_s"] = limit_s
        processes.LARGEST_OUTPUT = 4 << 20
        with contextlib.nullcontext() if harmless else one_line_errors():
            device = open_device(settings(here, phone=phone, push_timeout_s=limit_s))
            identity = device.identity()
            program = Program(name="a", path=here / "a.pte", vocab_size=64)
            [result] = device.measure([program], device.settings.workload)
            values: dict[str, Any] = {"identity": identity, "result": result.to_dict()}
            if not phone:
                values["continued"] = device.generate(program.path, [1, 2], 2)
            print(json.dumps(values))
        return 0

    return main


def _plausible(work: Path, output: str) -> bool:
    """Return True if the printed identity and times can be those of a device."""
    values = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    identity, result = values["identity"], values["result"]
    texts = all(str(each).isprintable() for each in identity.values())
    times = [each["ms"] for each in result["latencies"].values()]
    heat = [each[when].get("celsius") for each in result["conditions"] for when in ("before",)
            if when in each]  # fmt: skip
    return (
        texts
        and 1 <= identity["cores"] <= 9999
        and all(math.isfinite(each) and 0 <= each < 60_000 for each in times)
        and all(each is None or 5 <= each <= 120 for each in heat)
    )


_GREETINGS = (
    *("Welcome to board\n", "no end", "\x1b[31mred\x1b[0m\n", '{"cpu": 1}\n', "\0\0", "\xff\xfe"),
    *("flash-begin:0\n", "\nflash-exit:0:1\n", "\r\n", "text\n" * 20_000, "PyTorchObserver {}\n"),
    *("Last login: today\r\n\r\n", "7\n", "damaged\n", "\x1b]0;title\x07", "\n\n\n"),
)
_COMMANDS = (
    *("importlib", "machine-id", "files", "stat", "sha256sum", "job.json", "result.json", "runpy"),
    *("getprop", "thermal", "statistics|model_path", "devices", "push|cp ", ""),
)
_SAYS = (
    *("No space left on device", "Read-only file system", "Permission denied", "not found"),
    *("Killed", "Input/output error", "\x1b[31mred", "x" * 5000, ""),
)
_TOOLS = (
    *("stat", "date", "sha256sum", "cat", "mkdir", "mv", "chmod", "touch", "uname", "grep", "rm"),
    *("env", "python3", "getprop", "dumpsys", "sh", "cp"),
)
_VALUES = ("0", "-273000", "255000", "33", "330", "33000", "33.5", "", "x", "-1", "9" * 5000)
_VALUES += ("45", "60", "450", "47000", "2147483647", "nan", "1e5", "\x1b[1m33000")


def _greets(random: Random) -> tuple[str, Board]:
    before, behind = (random.choice(("", *_GREETINGS)) for _ in range(2))
    plan = {"when": "flash-begin", "way": "greets", "before": before, "behind": behind}
    return f"greets {before[:20]!r}, {behind[:20]!r}", Board(plan, harmless=True)


def _spoils(random: Random) -> tuple[str, Board]:
    when, first = random.choice(_COMMANDS), random.choice([1, 1, 2, 3, 5])
    last = random.choice([first, 999])
    plan: dict[str, Any] = {"when": when, "first": first, "last": last}
    way = random.choice(["bytes", "bytes", "cut", "refused", "hangs", "floods"])
    plan |= {"way": way, "seed": random.random(), "skip": random.randrange(30)}
    plan |= {"part": random.random(), "code": random.choice([0, 1, 127, 137, 255])}
    plan |= {"text": random.choice(_SAYS)}
    said = f"{plan['code']} {plan['text'][:30]!r}"
    return f"{way} at {when!r} {first} to {last} ({said}, {plan['skip']})", Board(plan)


def _answers(random: Random) -> tuple[str, Board]:
    answers = [("probe", PROBE), ("result", RESULT), ("continued", {"answers": [[3]]})]
    return _answer(random, *random.choice(answers))


def _statistics(random: Random) -> tuple[str, Board]:
    return _answer(random, "statistics", STATISTICS)


def _answer(random: Random, name: str, values: Any) -> tuple[str, Board]:
    mark = f"text\n{_LOGGED}".encode() if name == "statistics" else b""
    if random.random() < 0.6:
        changes = json_changes(values, random)
        what, changed = next(changes)
        content = to_json(changed)
    else:
        skip = random.randrange(40)
        bytes_ = (each for each in byte_changes(to_json(values), random) if each[1] is not None)
        what, content = next(islice(bytes_, skip, None))
    return f"{name}: {what}", Board(answers={name: mark + (content or b"") + b"\n"})


def _properties(random: Random) -> tuple[str, Board]:
    text = "".join(f"{key}={value}\n" for key, value in PROPERTIES.items()).encode()
    skip = random.randrange(40)
    bytes_ = (each for each in byte_changes(text, random) if each[1] is not None)
    what, content = next(islice(bytes_, skip, None))
    return f"properties: {what}", Board(answers={"properties": content or b""})


def _breaks(random: Random) -> tuple[str, Board]:
    name, code = random.choice(_TOOLS), random.choice([0, 1, 126, 127, 137])
    text, stream = random.choice(_SAYS), random.choice([1, 2])
    body = f"printf '%s\\n' '{text}' >&{stream}; exit {code}\n"
    return f"{name} says {text[:30]!r} on {stream}, code {code}", Board(tools={name: body})


def _runner_fails(random: Random) -> tuple[str, Board]:
    text, code = random.choice(_SAYS), random.choice([1, 126, 134, 137, 255])
    key = random.choice(["code", "code", "probe_code"])
    answers = {"errors": f"{text}\n".encode(), key: str(code).encode()}
    return f"runner: {text[:30]!r}, code {code}", Board(answers=answers)


def _heats(random: Random) -> tuple[str, Board]:
    names = ("skin", "battery", "cpu-0", "pa", "x y")
    zones = [(random.choice(names), random.choice(_VALUES)) for _ in range(random.randrange(4))]
    service = ""
    if random.random() < 0.4:
        rows = "".join(
            f"\tTemperature{{mValue={random.choice(_VALUES)}, mType=3, mName=SKIN, mStatus=0}}\n"
            for _ in range(2)
        )
        service = f"Current temperatures from HAL:\n{rows}"
    what = f"zones {zones}"[:200] + f", service {service[:60]!r}"
    return what, Board(zones=zones, answers={"service": service.encode()})


_OF_BOARDS = (_greets, _spoils, _spoils, _answers, _answers, _breaks, _runner_fails)
_OF_PHONES = (_greets, _spoils, _spoils, _statistics, _properties, _breaks, _runner_fails, _heats)


def attempts_boards(random: Random, project: Path) -> Iterator[Attempt]:
    """Boards and phones by turns; each is identified and measured."""
    yield _attempt(False, "nothing odd", Board(harmless=True))
    yield _attempt(True, "nothing odd", Board(harmless=True))
    while True:
        phone = random.random() < 0.5
        what, board = random.choice(_OF_PHONES if phone else _OF_BOARDS)(random)
        yield _attempt(phone, what, board)


def _attempt(phone: bool, what: str, board: Board) -> Attempt:
    def prepare(work: Path) -> list[str]:
        set_up(work, board)
        return ["measurements"]

    return Attempt(
        f"{'phone' if phone else 'board'}: {what}",
        prepare,
        passes=_plausible,
        main=_measure(phone, board.harmless),
        timeout_s=90.0,
    )


KINDS = {"boards": attempts_boards}
