"""Boards with an arm64 processor, emulated by qemu-user; `make arm`. Timings there mean nothing."""

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash.arch import CacheFormat, Quantization, parse_pattern
from flash.device import thermal
from flash.device.factory import open_device
from flash.device.host import RUNNER, HostDevice
from flash.device.settings import DeviceKind
from flash.device.ssh import SshDevice
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder
from tests.device.boards import Board

ROOT = os.environ.get("ARM64_ROOT", "")
SCRIPT = Path(__file__).parents[2] / "scripts" / "arm64_root.sh"
TIMEOUT_S = 600.0
TRANSFORMS = {"as_trained": lambda model: model}
"""Changes of the weights before the lowering, by their names."""
FORMATS = [
    *itertools.product(Quantization, CacheFormat, [AttentionForm.matmul]),
    *itertools.product([Quantization.int8da4w], CacheFormat, [AttentionForm.sdpa]),
]
TEXT = [1, *((7 * i * i + 3 * i) % 63 + 1 for i in range(30))]
PREFILL = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * TIMEOUT_S),
    pytest.mark.skipif(
        not Path(ROOT, "wheels").is_file(), reason="`make arm` makes the arm64 root and runs these"
    ),
]


@pytest.fixture(scope="module", params=["cortex-a76", "max,pauth-impdef=on"])
def board(request, tmp_path_factory):
    """An sshd in the root, for a processor of phones of 2019 and for one with all extensions."""
    folder = tmp_path_factory.mktemp("arm64")
    board = Board(
        folder,
        server=["env", f"QEMU_CPU={request.param}", SCRIPT, ROOT, "/usr/sbin/sshd"],
        user="board",
        python="python3",
        path="/usr/bin:/bin",
        environment=f"QEMU_CPU={request.param}",
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


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("quantization", "cache", "attention"),
    FORMATS,
    ids=["-".join(each.value for each in formats) for formats in FORMATS],
)
def test_the_same_program_gives_the_same_logits(
    transform, quantization, cache, attention, decoder, connect, settings, tmp_path
):
    lowering = LoweringSettings(
        quantization=quantization,
        cache=cache,
        attention=attention,
        max_context=64,
        prefill_chunk=8,
    )
    path = tmp_path / "model.pte"
    model = TRANSFORMS[transform](decoder)
    write(path, lower(model, lowering, bos_id=1, eos_ids=[0]))
    there = connect().score(path, TEXT, prefill=PREFILL, keep_logits=True)
    here = HostDevice(settings).score(path, TEXT, prefill=PREFILL, keep_logits=True)
    logits, expected = torch.tensor(there["logits"]), torch.tensor(here["logits"])
    error = (logits - expected).abs().max() / expected.abs().max()
    print(f"ERROR {quantization} {cache} {attention} {error:.3g}", file=sys.stderr)
    assert there["choices"] == here["choices"]


def test_tools_of_a_board_read_it(connect):
    device = connect()
    identity = device.identity()
    assert identity["system"] == "Linux aarch64"
    assert identity["runtime"].startswith("executorch 1.")
    assert identity["cores"] == os.cpu_count()
    print("IDENTITY", identity, file=sys.stderr)
    print("THERMAL", device._ask(thermal.SCRIPT), file=sys.stderr)
