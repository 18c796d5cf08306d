"""ExecuTorch's own exporter: shapes of the baselines, and a tiny one from shape to logits."""

import os
import signal
import subprocess
import sys

import pytest

from flash.arch import ArchSpec, CacheFormat, RopeKind, RopeScaling, count_parameters, parse_pattern
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import CheckFailed, InputError
from flash.interop import export_llm
from flash.interop.baselines import STOCK_MODELS, StockModel, stock_model, to_stock_model
from flash.interop.export_llm import check_stock, lower_stock
from flash.lowering.settings import LoweringSettings, SlidingForm
from tests.lowering.conftest import read_program

TINY = ArchSpec(
    model_dim=64,
    ffn_dim=96,
    layer_types=parse_pattern("F-"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=96,
    max_context=256,
)
FORMATS = LoweringSettings(max_context=64, prefill_chunk=16)


def host() -> HostDevice:
    return HostDevice(
        DeviceSettings(
            name="test",
            processes=1,
            warmups=1,
            runs=1,
            lowering=LoweringSettings(max_context=64, prefill_chunk=16),
            workload=Workload(prompts=[40], contexts=[40], decode_tokens=4),
        )
    )


@pytest.fixture(scope="module")  # a minute: for slow tests only
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock") / "a = 'new' folder" / "model.pte"
    lower_stock(to_stock_model(TINY), FORMATS, path)
    return path


@pytest.mark.slow
def test_program_answers_alike_in_chunks_and_token_by_token(program):
    tokens = [(7 * i) % 96 for i in range(40)]
    chunked = host().score(program, tokens, prefill=40, keep_logits=True)["logits"][0]
    single = host().score(program, tokens, prefill=1, keep_logits=True)["logits"][-1]
    assert len(chunked) == TINY.vocab_size
    assert max(chunked) - min(chunked) > 1e-3
    # Activations are quantised a call at a time, so that the two differ a little.
    spread = max(single) - min(single)
    assert max(abs(a - b) for a, b in zip(chunked, single, strict=True)) < 0.05 * spread


@pytest.mark.slow
def test_program_is_measured_like_ours(program):
    settings = host().settings
    subject = Program(name="tiny", path=program, vocab_size=TINY.vocab_size)
    measured = host().measure([subject], settings.workload)[0]
    assert measured.prefill.ms > measured.decode.ms > 0


@pytest.mark.slow
def test_nothing_is_left_beside_the_program(program):
    assert [path.name for path in program.parent.iterdir()] == ["model.pte"]


@pytest.mark.slow
def test_short_passes_change_no_instruction_delegate_or_weight(program, tmp_path):
    plain = tmp_path / "plain.pte"
    lower_stock(to_stock_model(TINY), FORMATS, plain, fast=False)
    ours, theirs = _contents(program), _contents(plain)
    assert len(ours.program.execution_plan[0].chains[0].instructions) > 40
    assert ours == theirs


def _contents(path):
    """All of a program but the flag that no runtime reads."""
    file = read_program(path.read_bytes())
    for value in file.program.execution_plan[0].values:
        if hasattr(value.val, "requires_grad"):
            value.val.requires_grad = False
    return file


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "gemma"])
def test_layers_that_only_the_stack_has(kind, tmp_path):
    params = {
        **to_stock_model(TINY).params,
        "layer_types": ["conv" if kind == "conv" else "full_attention", "full_attention"],
    }
    windows: tuple[int, ...] = ()
    if kind == "gemma":
        extra = {"post_attention_norm": True, "post_ffn_norm": True, "act_fn": "gelu_approx"}
        params, windows = {**params, **extra}, (8, 0)
    model = StockModel(name=kind, model_class="llama3", params=params, windows=windows)
    path = tmp_path / "model.pte"
    settings = LoweringSettings(
        max_context=64,
        prefill_chunk=16,
        cache=CacheFormat.int8,
        embedding_bits=8 if kind == "conv" else 4,
    )
    lower_stock(model, settings, path)
    subject = Program(name=kind, path=path, vocab_size=96)
    assert host().measure([subject], host().settings.workload)[0].prefill.ms > 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lfm2_350m", 354_483_968),
        ("lfm2_700m", 742_489_344),
        ("lfm2_1_2b", 1_170_340_608),
        ("gemma3_270m", 268_098_176),
        ("gemma3_1b", 999_885_952),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    assert stock_model(name).parameters == parameters


def test_counts_are_those_of_the_stack_itself():
    """In a process of its own: this changes the stack's classes."""
    code = """
from flash.compat import executorch_llm
from flash.interop.baselines import STOCK_MODELS
for name, model in STOCK_MODELS.items():
    if name.startswith("gemma3"):
        executorch_llm.complete_layers()
    shape = executorch_llm.meta_model(dict(model.params))
    weights = sum(p.numel() for p in shape.parameters())
    print(weights - shape.output.weight.numel())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counted = [model.parameters for model in STOCK_MODELS.values()]
    assert list(map(int, done.stdout.split())) == counted


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_norm": False}])
def test_our_specs_keep_their_count(changes):
    spec = TINY.replace(**changes)
    assert to_stock_model(spec).parameters == count_parameters(spec).total


def test_our_patterns_in_the_terms_of_the_stack():
    model = to_stock_model(TINY.replace(layer_types="FS-", sliding_window=24))
    assert model.params["layer_types"] == ["full_attention", "sliding_attention", "skip_attention"]
    assert model.windows == (0, 24, 0)
    scaled = TINY.replace(rope_scaling=RopeScaling(kind=RopeKind.llama3, factor=32.0))
    assert to_stock_model(scaled).params["rope_scale_factor"] == 32


def test_what_the_stack_cannot_express_is_refused_before_any_work(tmp_path):
    gemma = stock_model("gemma3_270m")
    with pytest.raises(InputError, match=r"lowering.prefill_chunk=2048: expected at most 1024"):
        check_stock(gemma, LoweringSettings(max_context=4096, prefill_chunk=2048))
    with pytest.raises(InputError, match=r"lowering.sliding=ring: expected stock for gemma3_270m"):
        check_stock(gemma, LoweringSettings(sliding=SlidingForm.ring))
    with pytest.raises(InputError, match=r"lowering.cache=bf16: expected fp32 or int8 for gemma3"):
        check_stock(gemma, LoweringSettings(cache=CacheFormat.bf16))
    with pytest.raises(InputError, match=r"lowering.group_size=256: expected a divisor"):
        check_stock(gemma, LoweringSettings(group_size=256))
    linear = TINY.replace(rope_scaling=RopeScaling(kind=RopeKind.linear, factor=2.0))
    with pytest.raises(InputError, match=r"arch.rope_scaling.kind=linear: expected llama3"):
        lower_stock(to_stock_model(linear), FORMATS, tmp_path / "a.pte")
    with pytest.raises(InputError, match=r"arch.stock=lfm2_35m: .*did you mean 'lfm2_350m'"):
        stock_model("lfm2_35m")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("print('first')\nraise ValueError('no such layer')\n", "utf-8")
    monkeypatch.setattr(export_llm, "CHILD", child)
    path = tmp_path / "out" / "model.pte"
    with pytest.raises(CheckFailed, match=r"code 1 and no program: .*ValueError: no such layer$"):
        lower_stock(to_stock_model(TINY), FORMATS, path)
    assert not list(path.parent.iterdir())


def test_ctrl_c_ends_the_export(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    started = tmp_path / "pid"
    child.write_text(
        "import os, pathlib, signal, time\n"
        f"pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n",
        "utf-8",
    )
    monkeypatch.setattr(export_llm, "CHILD", child)
    path = tmp_path / "out" / "model.pte"
    # A shell starts background jobs with the signal ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            lower_stock(to_stock_model(TINY), FORMATS, path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(path.parent.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
