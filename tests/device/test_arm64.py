"""Boards with an arm64 processor, emulated by qemu-user; `make arm`. Timings there mean nothing."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from flash.arch import CacheFormat, Quantization, parse_pattern
from flash.device import thermal
from flash.device.host import HostDevice
from flash.device.settings import DeviceKind
from flash.device.ssh import SshDevice
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder
from flash.rounding.decoder import turn_decoder
from tests.device.boards import Board

ROOT = os.environ.get("ARM64_ROOT", "")
CLONE = Path(__file__).parents[2]
TIMEOUT_S = 600.0
PHONE, LATEST = "cortex-a76", "max,pauth-impdef=on"
"""A processor of many phones, and one with all extensions, for which kernels differ."""
FP32, INT8DA4W = Quantization.fp32, Quantization.int8da4w
CASES = [
    *itertools.product([PHONE], [FP32, INT8DA4W], CacheFormat, [AttentionForm.matmul], [False]),
    *itertools.product([PHONE], [INT8DA4W], CacheFormat, [AttentionForm.sdpa], [True]),
    *itertools.product([LATEST], [INT8DA4W], CacheFormat, [AttentionForm.matmul], [True]),
]
"""Processor, weights, cache, attention in prefill, and whether the weights are rotated."""
SHORT = [([i, 29 * i % 63 + 1], 1 + i % 2) for i in range(1, 49)]
LONG = ([1, *((7 * i * i + 3 * i) % 63 + 1 for i in range(30))], 20)
"""Texts, and how many of their tokens are fed at once."""
SUMS, STEP = 1e-5, 0.1
"""Largest differences of a logit, divided by the largest logit: by the order of sums, of which 1e-6
was seen, and where that moves an activation or an entry of the cache by one step of its 8 bits, of
which 0.04 was seen. A layer does so to about one token in eight, and so to all tokens after it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(
        not Path(ROOT, "wheels").is_file(), reason="`make arm` makes the arm64 root and runs these"
    ),
]


@pytest.fixture(scope="module")
def board(request, tmp_path_factory):
    """An sshd in the root; its parameter is the processor."""
    cpu = f"QEMU_CPU={getattr(request, 'param', PHONE)}"
    board = Board(
        tmp_path_factory.mktemp("arm64"),
        server=["env", cpu, CLONE / "scripts" / "arm64_root.sh", ROOT, "/usr/sbin/sshd"],
        user="board",
        python="python3",
        path="/usr/bin:/bin",
        environment=cpu,
    )
    board.start()
    yield board
    board.stop()


@pytest.fixture
def connect(board, settings):
    """A function that opens the board with changed settings."""

    def connect(**changes):
        values = {"start_timeout_s": TIMEOUT_S, "run_timeout_s": TIMEOUT_S, **changes}
        return SshDevice(
            replace(settings, kind=DeviceKind.ssh, ssh=board.settings(folder="flash"), **values)
        )

    return connect


@pytest.fixture(scope="module")
def decoder(model):
    """A decoder whose layers have full and sliding attention and none."""
    torch.manual_seed(0)
    spec = model.spec.replace(layer_types=parse_pattern("FS-F"), sliding_window=8)
    decoder = Decoder(spec).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return decoder


def largest_difference(answer, expected):
    logits, known = torch.tensor(answer["logits"]), torch.tensor(expected["logits"])
    return float((logits - known).abs().max() / known.abs().max())


@pytest.mark.parametrize(
    ("board", "quantization", "cache", "attention", "rotated"),
    CASES,
    ids=[
        "-".join([cpu.partition(",")[0], *(each.value for each in formats), "rotated" * rotated])
        for cpu, *formats, rotated in CASES
    ],
    indirect=["board"],
)
def test_the_same_program_gives_the_same_logits(
    quantization, cache, attention, rotated, decoder, connect, settings, tmp_path
):
    lowering = LoweringSettings(
        quantization=quantization,
        cache=cache,
        attention=attention,
        max_context=64,
        prefill_chunk=8,
    )
    path = tmp_path / "model.pte"
    model = turn_decoder(decoder) if rotated else decoder
    write(path, lower(model, lowering, bos_id=1, eos_ids=[0]))
    there = connect().score_many(path, [*SHORT, LONG], keep_logits=True)
    here = HostDevice(settings).score_many(path, [*SHORT, LONG], keep_logits=True)
    errors = [largest_difference(*pair) for pair in zip(there, here, strict=True)]
    assert sorted(errors)[len(errors) // 4] < SUMS
    rounds = quantization is INT8DA4W or cache is not CacheFormat.fp32
    assert max(errors) < (STEP if rounds else SUMS)
    for one, other, error in zip(there, here, errors, strict=True):
        if error < SUMS:
            assert one["choices"] == other["choices"]
            assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-4)


def test_tools_of_a_board_read_it(connect):
    device = connect()
    identity = device.identity()
    assert identity["system"] == "Linux aarch64"
    assert identity["runtime"].startswith("executorch 1.")
    assert identity["cores"] == os.cpu_count()
    assert re.fullmatch(r".+ 0x41:0xd0b \(asimdhp asimddp.*\)", identity["cpu"])
    # qemu-user hands on the /sys of the machine below.
    there = thermal.parse(device._ask(thermal.SCRIPT))
    here = thermal.parse(
        subprocess.run(
            ["sh", "-c", thermal.SCRIPT], capture_output=True, text=True, check=True
        ).stdout
    )
    assert (there.sensor, set(there.max_khz)) == (here.sensor, set(here.max_khz))


def test_process_on_a_board_is_pinned(connect, board, program):
    pinned, done = [], threading.Event()

    def watch():
        while not done.wait(0.2):
            for child in psutil.Process(board.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.cmdline()[-1].endswith("result.json"):
                        pinned.append(child.cpu_affinity())

    watcher = threading.Thread(target=watch)
    watcher.start()
    last = max(os.sched_getaffinity(0))
    try:
        connect(cpus=[last]).generate(program, [5, 9], 1)
    finally:
        done.set()
        watcher.join()
    assert pinned[-1] == [last]


def test_export_measures_on_the_board(board, tmp_path):
    link = board.settings(folder="flash")
    words = [
        "backbone=tiny",
        "device=ssh",
        *(f"device.ssh.{key}='{getattr(link, key)}'" for key in ("host", "port", "user")),
        *(f"device.ssh.{key}='{getattr(link, key)}'" for key in ("identity", "known_hosts")),
        "device.threads=1",
        f"device.start_timeout_s={TIMEOUT_S}",
        f"device.run_timeout_s={TIMEOUT_S}",
        "device.lowering.max_context=128",
        "device.workload.prompts=[32]",
        "device.workload.contexts=[32]",
        "device.workload.decode_tokens=2",
        "device.processes=1",
        "device.warmups=0",
        "device.runs=1",
        "logger=none",
        "new_tokens=4",
        "perplexity_tokens=64",
        "name=mine",
        f"runs={tmp_path}",
    ]
    command = [sys.executable, "-m", "flash", "export", *words]
    output = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(CLONE)}
    )
    assert output.returncode == 0, output.stderr
    result = json.loads((tmp_path / "exports" / "mine" / "export.json").read_text())
    assert result["device"]["system"] == "Linux aarch64"
    assert list(result["measurement"]["latencies"]) == ["prefill_32", "decode_32"]
    assert result["completion"]
