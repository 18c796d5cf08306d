"""The host as a device: measurements, scores, continuations, and processes that fail."""

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from flash.device import system_info
from flash.device.factory import open_device
from flash.device.host import RUNNER, HostDevice, run_process
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceKind
from flash.device.workload import Workload
from flash.errors import DeviceError, InputError
from flash.lowering.settings import LoweringSettings
from tests.model.greedy import generate

ROOT = Path(__file__).parents[2]


def test_programs_take_turns_in_fresh_processes(program, settings, tmp_path):
    copy = tmp_path / "copy.pte"
    copy.write_bytes(program.read_bytes())
    programs = [Program(name="a", path=program, vocab_size=64)]
    reference = Program(name="ref", path=copy, vocab_size=64)
    steps = []
    [result] = open_device(settings).measure(
        programs, settings.workload, reference, on_progress=lambda *done: steps.append(done)
    )
    assert steps == [(1, 2), (2, 2)]
    assert [len(process["prefill_20"]) for process in result.samples] == [2, 2]
    assert all(len(run["steps_ms"]) == 4 for p in result.samples for run in p["decode_30"])
    assert result.prefill.ms == pytest.approx(
        1e3 * min(run["wall_s"] for process in result.samples for run in process["prefill_20"])
    )
    assert 0 < result.decode.ms < result.prefill.ms
    assert result.peak_rss_mib > result.conditions[0]["baseline_rss_kib"] / 1024 > 0
    assert result.load_ms > 0
    assert set(result.conditions[0]["reference_ms"]) == {"prefill_20", "decode_30"}
    assert result.conditions[0]["started"] < result.conditions[1]["started"]
    process = result.conditions[0]["process"]
    assert process["wall_s"] > 0
    assert process["user_s"] > 0
    assert "others_s" in process
    assert Measurement.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_file_continues_text_as_the_decoder_does(model, program, settings):
    prompt = [5, 9, 33, 2, 17, 40, 8, 8, 61, 30, 3]  # longer than one chunk
    expected = generate(model, torch.tensor([prompt]), 12)[0, len(prompt) :].tolist()
    device = HostDevice(settings)
    assert device.generate(program, prompt, 12) == expected
    stop = expected[4]
    assert device.generate(program, prompt, 12, [stop]) == expected[: expected.index(stop)]


@torch.no_grad()
def test_file_scores_text_as_the_decoder_does(model, program, settings):
    text = [5, 9, 33, 2, 17, 40, 8, 8, 61, 30, 3]
    logits = model(torch.tensor([text]))[0]
    likelihoods = torch.log_softmax(logits.double(), -1)
    expected = [float(likelihoods[i - 1, text[i]]) for i in range(3, len(text))]
    scores = HostDevice(settings).score(program, text, prefill=3, keep_logits=True)
    assert scores["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(torch.tensor(scores["logits"]), logits[2:], atol=1e-4, rtol=1e-4)


def test_many_texts_go_through_one_process(model, program, settings, monkeypatch):
    """Results are those of single calls, also if the tokens that texts share are fed once."""
    device = HostDevice(settings)
    jobs = []
    run = device.run
    monkeypatch.setattr(device, "run", lambda job, programs: jobs.append(job) or run(job, programs))
    start = [5, 9, 33, 2, 17, 40, 8, 8, 61, 30, 3]
    texts = [([*start, 4, 6], 11), ([*start, 7], 11), (start, 1), ([9, 5, 1], 2), (start[:4], 3)]
    found = device.score_many(program, texts)
    again = device.score_many(program, texts, reuse=True)
    with torch.no_grad():
        for (tokens, prefill), one, other in zip(texts, found, again, strict=True):
            logits = model(torch.tensor([tokens]))[0, prefill - 1 : -1].double()
            targets = torch.tensor(tokens[prefill:])
            expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].tolist()
            for each in (one, other):
                assert each["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
                assert each["choices"] == logits.argmax(-1).tolist()
    prompts = [start, start[:7], [9, 5]]
    expected = [generate(model, torch.tensor([p]), 6)[0, len(p) :].tolist() for p in prompts]
    assert device.generate_many(program, prompts, 6, reuse=True) == expected
    stop = expected[0][2]
    first = expected[0].index(stop)
    assert device.generate_many(program, prompts[:1], 6, [stop]) == [expected[0][: first + 1]]
    assert len(jobs) == 4


def test_cut_off_file_is_one_clear_error(program, settings, tmp_path):
    broken = tmp_path / "broken.pte"
    broken.write_bytes(program.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"broken\.pte: cannot be loaded .* damaged"):
        HostDevice(settings).generate(broken, [1], 1)
    with pytest.raises(InputError, match=r"missing\.pte: no such file"):
        HostDevice(settings).generate(tmp_path / "missing.pte", [1], 1)


def test_what_a_file_was_exported_with_counts_and_not_the_settings(program, settings):
    """The program has a context of 64 tokens and calls of at most 8."""
    other = {
        chunk: replace(
            settings,
            lowering=LoweringSettings(max_context=context, prefill_chunk=chunk),
            workload=Workload(prompts=[20], contexts=[20], decode_tokens=2),
        )
        for context, chunk in ((128, 32), (22, 3))
    }
    text = list(range(40))
    found = [HostDevice(each).score(program, text, prefill=30) for each in other.values()]
    assert found == [HostDevice(settings).score(program, text, prefill=30)] * 2
    answer = HostDevice(settings).generate(program, text, 20)
    assert HostDevice(other[3]).generate(program, text, 20) == answer
    [measured] = HostDevice(other[32]).measure(
        [Program(name="a", path=program, vocab_size=64)], other[32].workload
    )
    assert measured.prefill.ms > 0


def test_more_than_the_context_is_refused_before_any_work(program, settings, monkeypatch):
    device = HostDevice(settings)
    monkeypatch.setattr(device, "run", pytest.fail)
    limit = r"expected at most 64 tokens together, the context that it was exported with"
    with pytest.raises(InputError, match=rf"^model\.pte: a text of 70 tokens: {limit}"):
        device.score(program, [1] * 70)
    with pytest.raises(InputError, match=rf"a prompt of 60 tokens and 5 new ones: {limit}"):
        device.generate(program, [1] * 60, 5)
    with pytest.raises(InputError, match=rf"a workload of 65 tokens: {limit}"):
        device.measure(
            [Program(name="a", path=program, vocab_size=64)],
            Workload(prompts=[20], contexts=[61], decode_tokens=4),
        )


def test_a_text_fills_the_context(program, settings):
    device = HostDevice(settings)
    assert len(device.score(program, [1] * 65)["choices"]) == 64
    assert len(device.generate(program, [1] * 60, 4)) == 4


def test_huge_pages_are_of_the_process_and_of_the_identity(settings):
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text("ascii"):
        pytest.skip("the kernel gives no huge pages")
    takes = "x = bytearray(2**26); x[::4096] = bytes(2**14); import re; print(re.search("
    takes += "r'AnonHugePages: +(\\d+) kB', open('/proc/self/smaps_rollup').read())[1])"
    huge = replace(settings, huge_pages=True)
    kib = [
        int(run_process([sys.executable, "-c", takes], each.variables, 60.0, "x")[0])
        for each in (settings, huge)
    ]
    assert kib[1] - kib[0] > 2**15  # half of what it takes
    assert "huge_pages" not in settings.identity()
    assert settings.identity() != huge.identity()
    identities = [HostDevice(each).identity() for each in (settings, huge)]
    assert identities[1] == {**identities[0], "huge_pages": 1}
    with pytest.raises(InputError, match="huge_pages=true: expected false with kind=android"):
        replace(settings, kind=DeviceKind.android, cpus=None, huge_pages=True)


def test_dead_and_slow_processes_are_errors_with_a_name():
    dies = "import sys; print('boom', file=sys.stderr); sys.exit(3)"
    with pytest.raises(DeviceError, match="model a: the runner exited with code 3: boom"):
        run_process([sys.executable, "-c", dies], {}, 60.0, "model a")
    # The runtime's own lines are no reason.
    silent = f"import os, sys; sys.path.insert(0, {str(RUNNER.parent)!r}); import runner; "
    silent += "runner.prepare(1); os._exit(4)"
    with pytest.raises(DeviceError, match="runner exited with code 4: it printed nothing"):
        run_process([sys.executable, "-c", silent], {}, 60.0, "model a")
    killed = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(
        DeviceError, match=r"model c: .* device's memory was full; lower latency\.g"
    ):
        run_process([sys.executable, "-c", killed], {}, 60.0, "model c")
    with pytest.raises(DeviceError, match="model b: no result after 0 s"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.3, "model b")


def test_disturbed_process_is_replaced_once_and_counted(settings, monkeypatch, tmp_path):
    def result(ttft_s):
        times = {"prefill_20": [{"wall_s": ttft_s}], "decode_30": [{"steps_ms": [1.0]}]}
        return {
            "samples": {"a": times},
            "load_ms": {"a": 1.0},
            "load_rss_kib": {"a": 1024},
            "peak_rss_kib": 2048,
            "baseline_rss_kib": 1,
            "started": 0.0,
            "start_ms": 0.0,
            "load_average": 0.0,
            "process": {},
        }

    answers = iter([result(0.010), result(5.0), result(0.012), result(0.011)])
    device = HostDevice(replace(settings, processes=3, reject_ratio=1.5))
    monkeypatch.setattr(device, "run", lambda job, programs: next(answers))
    programs = [Program(name="a", path=tmp_path, vocab_size=64)]
    [measured] = device.measure(programs, settings.workload)
    assert (measured.rejected, len(measured.samples)) == (1, 4)
    assert [process["accepted"] for process in measured.samples] == [True, False, True, True]
    assert measured.prefill.ms == pytest.approx(10)
    assert measured.prefill.se_ms == pytest.approx(0.5)  # (11 - 10) / (3 - 1)


def test_a_killed_measurement_leaves_no_process_behind(program, settings):
    code = """
        import dataclasses, sys
        from pathlib import Path
        from flash.arch import Quantization
        from flash.device.host import HostDevice
        from flash.device.measurement import Program
        from flash.device.settings import DeviceSettings
        from flash.device.workload import Workload
        from flash.lowering.settings import LoweringSettings
        formats = LoweringSettings(quantization=Quantization.fp32, max_context=64)
        times = Workload(prompts=[20], contexts=[30])
        settings = DeviceSettings(name="t", lowering=formats, workload=times, runs=10**4)
        HostDevice(settings).measure(
            [Program(name="a", path=Path(sys.argv[1]), vocab_size=64)], settings.workload
        )
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(program)]
    with subprocess.Popen(command, cwd=ROOT) as measuring:
        until = time.monotonic() + 120
        runners = []
        while not runners and time.monotonic() < until:
            time.sleep(0.1)
            runners = psutil.Process(measuring.pid).children()
        time.sleep(1.0)  # the runner's first line is past
        measuring.kill()
    gone, alive = psutil.wait_procs(runners, timeout=20)
    assert len(gone) == 1
    assert not alive


def test_a_processor_is_told_from_others_of_its_name(monkeypatch, tmp_path):
    lines = "model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\nmodel name\t: AMD EPYC\n"
    known = tmp_path / "cpuinfo"
    known.write_text(lines)
    monkeypatch.setattr("builtins.open", lambda path: known.open())
    assert system_info.processor() == "AMD EPYC (avx2 avx512f)"


def test_an_arm_processor_is_told_by_its_board_and_cores(monkeypatch, tmp_path):
    # As an arm64 kernel writes it: no line has a name.
    core = (
        "processor\t: {}\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: {}\n"
    )
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "\n".join([core.format(0, "0xd05"), core.format(1, "0xd05"), core.format(2, "0xd0b")])
    )
    model = tmp_path / "model"
    real = open
    files = {"/proc/cpuinfo": cpuinfo, "/proc/device-tree/model": model}
    monkeypatch.setattr("builtins.open", lambda path: real(files[path]))
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert system_info.processor() == "aarch64 0x41:0xd05 0x41:0xd0b (asimddp)"
    model.write_text("A Board Rev 1.0\0")
    assert system_info.processor() == "A Board Rev 1.0 0x41:0xd05 0x41:0xd0b (asimddp)"


@pytest.mark.parametrize(
    ("libc", "enabled", "lack"),
    [
        ("glibc", "always [madvise] never\n", None),
        ("glibc", "[always] madvise never\n", None),
        ("glibc", "always madvise [never]\n", "its kernel's transparent_hugepage is never"),
        ("glibc", None, "its kernel has no transparent_hugepage"),
        ("", "always [madvise] never\n", "its C library is not glibc"),
    ],
)
def test_huge_pages_are_refused_where_the_kernel_gives_none(
    monkeypatch, tmp_path, settings, libc, enabled, lack
):
    path = tmp_path / "enabled"
    if enabled is not None:
        path.write_text(enabled)
    with monkeypatch.context() as patch:
        patch.setattr("platform.libc_ver", lambda: (libc, ""))
        patch.setattr(system_info, "open", lambda _: path.open(), raising=False)
        found = system_info.no_huge_pages()
    device = HostDevice(replace(settings, huge_pages=True))
    monkeypatch.setattr("flash.device.host._probed", lambda: {"no_huge_pages": found})
    if lack is None:
        assert "no_huge_pages" not in device.identity()
    else:
        with pytest.raises(InputError, match=f"device.huge_pages=true.*{lack}"):
            device.identity()


def test_identity_holds_what_changes_times(settings):
    identity = HostDevice(settings).identity()
    assert identity["threads"] == 1
    assert identity["runtime"].startswith("executorch 1.")
    assert identity["cpu"]


def test_process_is_pinned_and_several_lengths_are_timed(program, settings):
    cpu = max(os.sched_getaffinity(0))
    settings = replace(
        settings,
        cpus=[cpu],
        workload=Workload(prompts=[20, 5], contexts=[30, 3, 9], decode_tokens=4),
    )
    [measured] = HostDevice(settings).measure(
        [Program(name="a", path=program, vocab_size=64, flush_mib=1)], settings.workload
    )
    names = ["prefill_20", "prefill_5", "decode_30", "decode_3", "decode_9"]
    assert list(measured.latencies) == names
    assert measured.prefill == measured.latencies["prefill_20"]
    assert measured.decode == measured.latencies["decode_30"]
    assert HostDevice(settings).identity()["cpus"] == str(cpu)
