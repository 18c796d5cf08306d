"""Phones: measurements, lost connections and heat, on a scripted phone behind the real adb."""

import json
import os
import shutil
import socket
import string
import subprocess
import sys
import threading
from dataclasses import replace

import psutil
import pytest

from flash.device import llama_main, thermal
from flash.device.android import AndroidDevice
from flash.device.connections import AndroidSettings
from flash.device.factory import open_device, text_device
from flash.device.measurement import Measurement, Program
from flash.device.remote import content_name
from flash.device.settings import DeviceKind
from flash.device.workload import Workload
from flash.errors import DeviceError, InputError
from flash.latency.rows import conditions_of
from flash.latency.store import SubjectKind
from flash.search.fingerprint import check_fingerprint
from tests.device.adbd import Phone

pytestmark = pytest.mark.skipif(shutil.which("adb") is None, reason="needs Debian's adb")

LETTERS = string.ascii_letters + string.digits + "_^"
# Tokens are characters. The phone's file `mode` is Python that it runs before it answers.
LLAMA_MAIN = f"""#!{sys.executable} -ES
import json, os, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
phone = pathlib.Path(__file__).parents[2]
with open(phone / "calls", "a") as calls:
    print(json.dumps({{**flags, "mask": os.environ.get("MASK", "")}}), file=calls)
prompt = open(flags["prompt_file"]).read()
model = open(flags["model_path"], "rb").read()
exec((phone / "mode").read_text() if (phone / "mode").exists() else "")
steps = int(flags["max_new_tokens"]) - 1
print(prompt + "!" * steps)
print("RSS after loading model: 10.5 MiB (0 if unsupported)", file=sys.stderr)
start, n = 1700000000000, len(prompt)
print("PyTorchObserver " + json.dumps({{
    "prompt_tokens": n, "generated_tokens": steps, "model_load_start_ms": start,
    "model_load_end_ms": start + 40, "inference_start_ms": start + 50,
    "prompt_eval_end_ms": start + 50 + 2 * n, "first_token_ms": start + 50 + 2 * n,
    "inference_end_ms": start + 50 + 2 * n + 3 * steps, "aggregate_sampling_time_ms": 1,
    "SCALING_FACTOR_UNITS_PER_SECOND": 1000}}))
"""
# Each look at a warm phone finds it 10 degrees cooler.
DUMPSYS = """
read warm < {root}/celsius
echo "Cached temperatures:
	Temperature{{mValue=99.0, mType=3, mName=SKIN, mStatus=0}}
Current temperatures from HAL:
	Temperature{{mValue=70.5, mType=0, mName=CPU0, mStatus=0}}
	Temperature{{mValue=$warm.5, mType=3, mName=SKIN, mStatus=0}}"
[ "$warm" -gt 30 ] && echo $((warm - 10)) > {root}/celsius
true
"""
FINGERPRINT = "maker/product/device:15/AP3A.1/S931:user/release-keys"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The real adb server on a port and with keys of its own."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "HOME": str(home),
        "ADB_VENDOR_KEYS": str(home),
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",  # do not look for emulators
    }
    command = ["adb", "-P", str(port)]
    with (home / "log").open("wb") as log:
        subprocess.run([*command, "start-server"], env=environment, stderr=log, check=True)
    yield port
    subprocess.run([*command, "kill-server"], check=False)


def adb(server, *words):
    command = ["adb", "-P", str(server), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def make_phone(server, tmp_path):
    """A function that makes an attached phone with eight cores."""
    phones = []

    def make(attach=True):
        phone = Phone(tmp_path / f"phone{len(phones)}")
        phones.append(phone)
        for cpu in range(8):
            clocks = phone.path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq")
            clocks.mkdir(parents=True)
            for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq"):
                (clocks / name).write_text("2000000\n")
        phone.path("/sys/devices/system/cpu/possible").write_text("0-7\n")
        (phone.root / "celsius").write_text("30\n")
        phone.install(
            "getprop",
            f'case "$1" in *fingerprint) echo {FINGERPRINT};; *soc*) echo SM1;; '
            f"*serialno) echo R{len(phones)};; "
            "*) echo Fake;; esac\n",
        )
        phone.install("dumpsys", DUMPSYS.format(root=phone.root))
        phone.install("taskset", 'export MASK="$1"; shift; exec "$@"\n')
        if attach:
            assert "connected" in adb(server, "connect", phone.serial)
        return phone

    yield make
    for phone in phones:
        adb(server, "disconnect", phone.serial)
        phone.unplug()


@pytest.fixture
def phone(make_phone):
    return make_phone()


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "model": {
                "type": "BPE",
                "vocab": {letter: i for i, letter in enumerate(LETTERS)},
                "merges": [],
            },
        })
    )
    return path


@pytest.fixture
def pte(tmp_path):
    path = tmp_path / "it's a model.pte"
    path.write_bytes(b"program" * 100_000)
    return path


@pytest.fixture
def connect(server, settings, tokenizer, tmp_path, monkeypatch):
    """A function that opens the only phone, with changed settings."""
    monkeypatch.setattr("flash.device.android.POLL_S", 0.01)
    runner = tmp_path / "llama_main"
    runner.write_text(LLAMA_MAIN)

    def connect(link=(), contexts=(20, 30), **changes):
        values = {
            "server_port": server,
            "runner": str(runner),
            "tokenizer": str(tokenizer),
            "backoff_s": 0.05,
            "reconnect_timeout_s": 5.0,
            "retries": 2,
            **dict(link),
        }
        workload = replace(settings.workload, contexts=list(contexts))
        changed = {"workload": workload, "runs": 1, "processes": 1, **changes}
        kind = DeviceKind.android
        device = open_device(
            replace(settings, kind=kind, android=AndroidSettings(**values), **changed)
        )
        assert isinstance(device, AndroidDevice)
        return device

    return connect


def measure(device, pte):
    [result] = device.measure(
        [Program(name="a", path=pte, vocab_size=64)], device.settings.workload
    )
    return result


def calls(phone):
    lines = phone.path("/data/local/tmp/calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def mode(phone, line):
    phone.path("/data/local/tmp/mode").write_text(line)


def test_phone_measures_prompts_and_decoding(phone, connect, pte):
    device = connect(cpus=[4, 5, 7], threads=3)
    result = measure(device, pte)
    assert {name: latency.ms for name, latency in result.latencies.items()} == {
        "prefill_20": 40, "decode_20": 3, "decode_30": 3,
    }  # fmt: skip
    assert result.load_ms == 40
    assert result.model_rss_mib == 10.5
    first, second = calls(phone)  # one process serves the prompt and the context of 20
    assert [first["max_new_tokens"], first["cpu_threads"], first["warmup"]] == ["5", "3", "true"]
    assert first["mask"] == second["mask"] == "b0"
    assert Measurement.from_dict(json.loads(json.dumps(result.to_dict()))).name == "a"
    [conditions] = result.conditions
    assert conditions["throttled"] == 0
    assert conditions["before"]["sensor"] == "skin"
    assert conditions["before"]["celsius"] == 30.5
    assert conditions["after"]["frequency_khz"][7] == 2_000_000
    files = phone.path("/data/local/tmp/flash/files")
    assert (files / content_name(pte)).read_bytes() == pte.read_bytes()
    assert len(list(files.iterdir())) == 5  # runner, tokenizer, two prompts, program
    measure(device, pte)
    assert sum("sha256sum" in command for command in phone.shells) == 5  # nothing sent twice


def test_identity_names_what_changes_times(phone, connect):
    identity = connect(threads=2).identity()
    assert identity["model"] == "Fake"
    assert identity["cpu"] == "SM1"
    assert (identity["cores"], identity["threads"]) == (8, 2)
    assert identity["system"] == "Android 15/AP3A.1/S931"
    assert str(identity["runtime"]).startswith("llama_main ")
    with pytest.raises(InputError, match=r"device\.threads=9: expected 1 to the 8 cores of phone"):
        connect(threads=9).identity()


def test_what_llama_main_cannot_do_is_said(phone, connect, pte):
    device = connect()
    with pytest.raises(InputError, match="neither scores text nor continues tokens"):
        device.score(pte, [1, 2])
    block = [Program(name="block", path=pte, model_dim=64)]
    with pytest.raises(InputError, match="whole models only, not blocks as block"):
        device.measure(block, device.settings.workload)
    zero = Workload(prompts=[], contexts=[0], decode_tokens=1)
    with pytest.raises(InputError, match=r"contexts=\[0\]"):
        device.measure([Program(name="a", path=pte, vocab_size=64)], zero)


def test_texts_for_a_phone_go_through_the_host(phone, connect, program):
    device = connect()
    assert text_device(device).generate(program, [5, 6], 3, stop=[0])
    host = text_device(device)
    assert text_device(host) is host


def test_no_phone_several_phones_and_wrong_serial(make_phone, connect, pte):
    with pytest.raises(InputError, match=r"serial=null: expected one phone, found none; attach"):
        connect().identity()
    one, two = make_phone(), make_phone()
    with pytest.raises(InputError, match=r"found 127\S+ \(device\), 127\S+ \(device\); name one"):
        connect().identity()
    with pytest.raises(InputError, match="serial=other: not attached; adb lists 127"):
        connect({"serial": "other"}).identity()
    # Both at once, each by its serial.
    devices = [connect({"serial": phone.serial}, name="") for phone in (one, two)]
    assert len({device.resource for device in devices}) == 2
    threads = [threading.Thread(target=measure, args=(device, pte)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls(one)) == len(calls(two)) == 2


def test_two_phones_of_a_model_are_two_devices(make_phone, connect, pte, tmp_path):
    """By default also two names; with one name their results are still told apart."""
    phones = make_phone(), make_phone()
    links = [{"serial": phone.serial} for phone in phones]
    names = [connect(link, name="").settings.name for link in links]
    assert names == [f"phone-127.0.0.1-{phone.serial.partition(':')[2]}" for phone in phones]
    one, two = (connect(link, name="mine") for link in links)
    differing = {key for key, value in one.identity().items() if two.identity()[key] != value}
    assert differing == {"unit"}
    assert not any("R1" in str(value) for value in one.identity().values())
    conditions = [
        conditions_of(device, device.settings.workload, point, device.settings.lowering)
        for device in (one, two, connect(links[0], name="mine"))
        for point in device.settings.workload.points[:1]
    ]
    keys = [each.key(SubjectKind.model, {}) for each in conditions]
    assert keys[0] == keys[2] != keys[1]
    with pytest.raises(InputError, match=r"but these differ: device\.unit \(was"):
        check_fingerprint(
            "key", "s", {"device": one.identity()}, {"device": two.identity()}, "choose another"
        )
    former = json.loads(json.dumps(one.identity()))
    one.check_unit(former, tmp_path)
    with pytest.raises(InputError, match=r"^device\.name=mine: .* of another device of this name"):
        two.check_unit(former, tmp_path)
    del former["unit"]  # of a report that was written before there were units
    two.check_unit(former, tmp_path)


def test_a_phone_is_the_same_by_another_address(server, make_phone, connect):
    phone = make_phone()
    first = connect().identity()
    other = phone.serial.replace("127.0.0.1", "localhost")
    assert "connected" in adb(server, "connect", other)
    try:
        assert connect({"serial": other}).identity() == first
    finally:
        adb(server, "disconnect", other)


def test_unauthorized_phone_says_what_to_do(server, make_phone, connect):
    phone = make_phone(attach=False)
    phone.authorized = False
    adb(server, "connect", phone.serial)
    with pytest.raises(InputError, match="unauthorized; unlock it and accept"):
        connect().identity()


def test_cut_push_is_repeated_and_leaves_nothing_half(phone, connect, pte):
    phone.cut_push_after = 300_000
    measure(connect(), pte)
    assert phone.cut_push_after is None
    files = phone.path("/data/local/tmp/flash/files")
    assert (files / content_name(pte)).read_bytes() == pte.read_bytes()
    assert not list(files.glob("*.part"))


def test_cut_run_is_repeated_and_the_first_process_ends(phone, connect, pte):
    mode(
        phone,
        "first = phone / 'first'\n"
        "if not first.exists(): first.write_text(str(os.getpid())); time.sleep(60)\n",
    )
    phone.cut_run_of = "--model_path"
    result = measure(connect(), pte)
    assert result.latencies["prefill_20"].ms == 40
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(phone.path("/data/local/tmp/first").read_text())).wait(5)


def test_phone_that_does_not_come_back(phone, connect, pte):
    device = connect({"reconnect_timeout_s": 0.2})
    device.identity()
    phone.unplug()
    with pytest.raises(DeviceError, match="did not come back .* gave up after 3 tries"):
        measure(device, pte)
    phone.plug()
    assert measure(device, pte).latencies["prefill_20"].ms == 40


def test_full_storage_is_one_clear_error(phone, connect, pte):
    phone.full = True
    with pytest.raises(DeviceError, match=r"storage is full; .*/data/local/tmp/flash"):
        measure(connect(), pte)
    assert not list(phone.path("/data/local/tmp/flash/files").iterdir())


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("sys.exit('E executorch: Failed to load method forward: 0x20')", InputError,
         r"a: cannot be loaded \(E executorch: Failed .* than the device's llama_main"),
        ("sys.exit('out of beans')", DeviceError, "exited with code 1: out of beans"),
        ("os.kill(os.getpid(), 9)", DeviceError, "memory was full"),
        ("os.kill(os.getpid(), 6)", DeviceError, "exited with code 134"),
        ("sys.exit(0)", DeviceError, "exited with code 0: it printed nothing"),
        ("prompt += 'x'", InputError, "makes 20 tokens of a prompt of which llama_main makes 21"),
    ],
)  # fmt: skip
def test_runner_that_fails_is_not_repeated(phone, connect, pte, line, error, message):
    mode(phone, line)
    with pytest.raises(error, match=message):
        measure(connect(), pte)
    assert len(calls(phone)) == 1


def test_run_that_hangs_is_ended(phone, connect, pte):
    mode(phone, "(phone / 'first').write_text(str(os.getpid())); time.sleep(60)")
    device = connect(start_timeout_s=1.0, run_timeout_s=0.1)
    with pytest.raises(DeviceError, match="no result after 1 s"):
        measure(device, pte)
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(phone.path("/data/local/tmp/first").read_text())).wait(5)


def test_warm_phone_is_waited_for(phone, connect, pte):
    (phone.root / "celsius").write_text("70\n")
    result = measure(connect(), pte)
    assert result.conditions[0]["before"]["celsius"] == 70.5
    assert result.conditions[0]["throttled"] == 0
    (phone.root / "celsius").write_text("70\n")
    with pytest.raises(DeviceError, match=r"still warm after 0 s \(skin 60\.5 C"):
        measure(connect({"cool_timeout_s": 0.0}), pte)


def test_throttled_processes_are_thrown_away_and_counted(phone, connect, pte):
    warms = "open(phone.parents[2] / 'celsius', 'w').write('60\\n')"
    mode(phone, f"if len(open(phone / 'calls').readlines()) == 1: {warms}")
    result = measure(connect(), pte)
    assert len(calls(phone)) == 3
    assert result.conditions[0]["throttled"] == 1
    mode(phone, warms)
    with pytest.raises(DeviceError, match="throttled in 2 processes in a row"):
        measure(connect({"throttled_retries": 1}), pte)


def test_clocks_held_down_count_as_throttled(phone, connect, pte):
    cap = phone.path("/sys/devices/system/cpu/cpu7/cpufreq/scaling_max_freq")
    cap.write_text("1500000\n")
    link = {"cool_timeout_s": 0.0}
    with pytest.raises(DeviceError, match=r"still warm .*clocks held down: \[7\]"):
        measure(connect(link), pte)
    assert measure(connect(link, cpus=[0, 1]), pte).prefill.ms == 40
    assert measure(connect({**link, "allow_capped": True}), pte).prefill.ms == 40


def test_zones_stand_in_for_the_thermal_service():
    reading = thermal.parse(
        "/sys/class/thermal/thermal_zone0/type:cpu-1-0\n/sys/class/thermal/thermal_zone0/temp:51200\n"
        "/sys/class/thermal/thermal_zone1/type:skin-msm\n"
        "/sys/class/thermal/thermal_zone1/temp:33000\n"
    )
    assert (reading.sensor, reading.celsius) == ("skin", 33.0)
    assert thermal.parse("").celsius is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("serial", "-x"), ("runner", ""), ("tokenizer", "no such"), ("folder", "tmp"),
     ("cool_timeout_s", -1.0)],
)  # fmt: skip
def test_bad_values_are_named(connect, key, value):
    with pytest.raises(InputError, match=rf"^(device\.android\.)?{key}="):
        connect({key: value})


def test_statistics_of_the_real_runner_are_read(phone, connect, program, tmp_path, monkeypatch):
    """The wheel holds the same C++ runner as llama_main: its line must be what we parse."""
    runner = tmp_path / "real_main"
    runner.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner\n"
        f"sys.path.insert(0, {os.path.dirname(thermal.__file__)!r})\n"
        "from runner import load_operators\n"
        "load_operators()\n"
        "flags = dict(word[2:].split('=', 1) for word in sys.argv[1:])\n"
        "config = GenerationConfig(max_new_tokens=int(flags['max_new_tokens']), temperature=0.0)\n"
        "main = TextLLMRunner(flags['model_path'], flags['tokenizer_path'])\n"
        "main.generate(open(flags['prompt_file']).read(), config)\n"
    )
    raw = []
    parse = llama_main.parse
    monkeypatch.setattr(llama_main, "parse", lambda *texts: raw.append(texts) or parse(*texts))
    device = connect({"runner": str(runner)}, contexts=[20])
    [result] = device.measure(
        [Program(name="a", path=program, vocab_size=64)], device.settings.workload
    )
    assert result.prefill.ms >= 0  # its clock has whole milliseconds
    assert result.load_ms >= 0
    assert result.model_rss_mib > 0
    run = llama_main.parse(*raw[-1])
    assert run is not None
    assert (run.prompt_tokens, run.steps) == (20, 4)
