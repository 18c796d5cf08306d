"""Facts about the two adapters: equal to the harness's own `hf`, and to each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flash.arch import Attention, Quantization
from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.evaluation.harness import DecoderLM, ProgramLM, TextLM
from flash.evaluation.tokenization import HarnessTokenizer
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.checkpoint import load
from flash.model.tokenizer import ModelTokenizer
from tests.evaluation.conftest import CONTEXT, TOKENIZER, save_decoder, tiny_decoder

LONG = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(30))
PAIRS = [
    ("def add(a, b):\n    return", " a + b"),
    ("def add(a, b):\n    return ", "a"),  # the space belongs to the answer
    ("def add(a, b):\n    return", " a"),
    ("def add(a, b):\n    return", " b"),  # shares all that is read with the one before
    ("", "import os"),
    ("x", "y = caf\u00e9 \u4e16\u754c\n\n\treturn"),
    (LONG, " raise ValueError"),  # longer than the model can read
    ("import", " os\nimport sys\n"),
]
PROMPTS = ["def add(a, b):", "import os", "class A:\n    def f(self)", LONG, "x = [1, 2"]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(kind, {}, each, i, metadata=("toy", i, 1))  # pyright: ignore[reportArgumentType]
        for i, each in enumerate(arguments)
    ]


def likelihoods(model: Any) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)


def rolling(model: Any) -> list[float]:
    texts = [(LONG,), ("import os",), (LONG[:400],)]
    return model.loglikelihood_rolling(requests("loglikelihood_rolling", texts))


def answers(model: Any, until: list[str], new_tokens: int = 24) -> list[str]:
    asked = {"until": until, "max_gen_toks": new_tokens, "do_sample": False}
    prompts = [(prompt, dict(asked)) for prompt in PROMPTS]
    return model.generate_until(requests("generate_until", prompts), disable_tqdm=True)


def stops_of(model: TextLM) -> list[str]:
    """Choose stop strings that occur in an answer, across tokens and within one."""
    free = answers(model, [])
    return [free[0][7:10], free[1][5:6]]


@pytest.fixture(scope="module", params=["llama", "qwen3 with windows"])
def folder(request, tmp_path_factory) -> Path:
    windows = request.param != "llama"
    model = tiny_decoder("FSF" if windows else "FF", qk_norm=windows)
    return save_decoder(model, tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    pytest.importorskip("accelerate")  # the harness's `hf` imports it
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_decoder_answers_as_the_harness_own_model(folder, theirs, batch_size):
    ours = DecoderLM(load(folder), HarnessTokenizer.open(folder), batch_size=batch_size)
    assert ours.max_length == theirs.max_length == CONTEXT
    for mine, other in zip(likelihoods(ours), likelihoods(theirs), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    assert rolling(ours) == pytest.approx(rolling(theirs), abs=1e-3)  # sums of 300 tokens
    until = stops_of(ours)
    assert answers(ours, until) == answers(theirs, until)
    assert answers(ours, until) != answers(ours, [])


def test_a_likeliest_continuation_is_called_so(folder):
    model = DecoderLM(load(folder), HarnessTokenizer.open(folder))
    tokens = model.tok_encode("def add(a, b):")
    [written] = model._continue([tokens], 6, [])
    found = model.score_pairs([(tokens, written), (tokens, [5, 6])])
    assert [likeliest for _, likeliest in found] == [True, False]


def test_an_end_token_ends_an_answer(folder):
    tokenizer = HarnessTokenizer.open(folder)
    model = DecoderLM(load(folder), tokenizer)
    prompt = model.tok_encode("def add(a, b):")
    [free] = model._continue([prompt], 8, [])
    ended = HarnessTokenizer(replace(tokenizer.tokenizer, ends=(0, free[3])))
    [written] = DecoderLM(load(folder), ended)._continue([prompt], 8, [])
    assert written == free[:4]
    assert ended.answer(free, []) == tokenizer.decode(free[:3])


def test_what_cannot_be_answered_is_said(folder):
    model = DecoderLM(load(folder), HarnessTokenizer.open(folder))
    with pytest.raises(InputError, match="task toy: answers of up to 256 tokens: expected fewer"):
        model.generate_until(requests("generate_until", [("a", {"until": []})]))
    asked = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    with pytest.raises(InputError, match="task toy: asks for sampled answers"):
        model.generate_until(requests("generate_until", [("a", asked)]))
    with pytest.raises(InputError, match="a continuation of 900 tokens: expected 1 to the 96"):
        model.score_pairs([([1], [2] * 900)])


@pytest.fixture(scope="module", params=["F-F", "S"])
def pair(request, tmp_path_factory) -> tuple[DecoderLM, ProgramLM]:
    """Adapters of a decoder and of its program in float32 on this machine."""
    folder = tmp_path_factory.mktemp("program")
    model = tiny_decoder(request.param)
    tokenizer = HarnessTokenizer.open(save_decoder(model, folder / "checkpoint"))
    settings = DeviceSettings(
        name="test",
        threads=1,
        lowering=LoweringSettings(
            quantization=Quantization.fp32, max_context=CONTEXT, prefill_chunk=16
        ),
        workload=Workload(prompts=[20], contexts=[30], decode_tokens=4),
    )
    write(folder / "model.pte", lower(model, settings.lowering, bos_id=0, eos_ids=[0]))
    kinds = model.spec.layer_types
    return DecoderLM(model, tokenizer), ProgramLM(
        HostDevice(settings), folder / "model.pte", tokenizer, kinds, CONTEXT
    )


def test_program_answers_as_its_decoder(pair, monkeypatch):
    monkeypatch.setattr("flash.evaluation.harness.FIRST_ROUND", 8)
    decoder, program = pair
    for mine, other in zip(likelihoods(program), likelihoods(decoder), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    until = stops_of(decoder)
    assert answers(program, until) == answers(decoder, until) != answers(decoder, [])


def test_program_takes_long_texts_and_many_processes(pair, monkeypatch):
    monkeypatch.setattr("flash.evaluation.harness.TEXTS_A_PROCESS", 3)
    decoder, program = pair
    assert rolling(program) == pytest.approx(rolling(decoder), abs=1e-2)
    until = stops_of(decoder)[1:]  # one character: the device can tell
    assert answers(program, until) == answers(decoder, until)


def test_shared_beginnings_are_read_once_where_caches_hold_all(pair, monkeypatch):
    decoder, program = pair
    reuse = []
    many = program._runtime.score_many
    monkeypatch.setattr(
        program._runtime, "score_many", lambda *a, **k: reuse.append(k["reuse"]) or many(*a, **k)
    )
    texts = [(list(range(9, 60)), 40), (list(range(9, 60)), 40), (list(range(9, 30)), 5)]
    rows = [(tokens[:first], tokens[first:]) for tokens, first in texts]
    found = program.score_pairs(rows)
    fresh = many(program._program, texts, reuse=False)
    expected = [sum(scores["log_likelihoods"]) for scores in fresh]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
    assert reuse == [Attention.sliding_attention not in decoder.model.spec.layer_types]


def test_batches_on_bf16_differ_by_rounding_only(folder):
    from flash.training.settings import Precision

    exact = DecoderLM(load(folder), HarnessTokenizer.open(folder))
    rough = DecoderLM(load(folder), HarnessTokenizer.open(folder), precision=Precision.bf16)
    pairs = list(zip(likelihoods(exact), likelihoods(rough), strict=True))
    assert any(a[0] != b[0] for a, b in pairs)
    for a, b in pairs:
        assert b[0] == pytest.approx(a[0], rel=0.02)


def test_a_special_token_is_a_stop_string_as_in_the_harness(folder, tmp_path):
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    model = load(folder)
    first = DecoderLM(model, HarnessTokenizer.open(folder))
    [free] = first._continue([first.tok_encode(PROMPTS[0])], 8, [])
    stop = first._tokenizer.backend.id_to_token(free[4])
    values = json.loads(TOKENIZER.read_text("utf-8"))
    values["added_tokens"].append({**values["added_tokens"][0], "id": free[4], "content": stop})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values), "utf-8")
    ours = DecoderLM(model, HarnessTokenizer(ModelTokenizer.open(path)))
    names = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(path), **names),
        batch_size=1,
        device="cpu",
    )
    assert answers(ours, [stop]) == answers(theirs, [stop]) != answers(ours, [])
    assert free[4] in ours._tokenizer.containing([stop])
