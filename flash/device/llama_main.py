"""ExecuTorch's `llama_main`: its arguments, its output, and prompts of an exact length.

One process loads one program, warms up if asked, feeds one prompt and decodes. It prints the text
and then a line of statistics with time stamps in whole milliseconds. Two times differ from those of
runner.py: the TTFT includes tokenization, and a decode step includes the choice of the token.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flash.device.answers import read_answer
from flash.errors import InputError, require
from flash.model.tokenizer_json import read_backend

STATISTICS = "PyTorchObserver "
"""Prefix of the line of statistics."""
# In most vocabularies at least one of these is a token that stays one token when it is repeated.
_PIECES = (" the", " a", "\n", "a ", " x", "a", "x", "0", ".", "the ")
_RSS = re.compile(r"RSS after (?:loading model|finishing text generation): (\d{1,9}(?:\.\d+)?) MiB")


@dataclass(frozen=True)
class Run:
    """Statistics of one process of llama_main.

    Attributes:
        prompt_tokens: Number of tokens that its own tokenizer made of the prompt.
        steps: Number of decode steps after the first token.
        load_ms: Time to load the program; 0 if a warm-up hides it.
        prefill_ms: Time to first token.
        decode_ms: Mean time of a decode step.
        rss_kib: Resident set size after loading and at the end; zeros if it prints none.
    """

    prompt_tokens: int
    steps: int
    load_ms: float
    prefill_ms: float
    decode_ms: float
    rss_kib: tuple[int, int]


def arguments(
    program: str, tokenizer: str, prompt: str, *, new_tokens: int, threads: int, warmup: bool
) -> list[str]:
    """Command-line arguments for a greedy run; paths are those on the device."""
    return [
        f"--model_path={program}",
        f"--tokenizer_path={tokenizer}",
        f"--prompt_file={prompt}",
        f"--max_new_tokens={new_tokens}",
        f"--cpu_threads={threads}",
        "--temperature=0",
        "--ignore_eos=true",
        f"--warmup={'true' if warmup else 'false'}",
    ]


@dataclass(frozen=True)
class _Statistics:
    """Numbers of tokens and time stamps that llama_main prints."""

    prompt_tokens: int
    generated_tokens: int
    model_load_start_ms: int
    model_load_end_ms: int
    inference_start_ms: int
    prompt_eval_end_ms: int
    inference_end_ms: int
    SCALING_FACTOR_UNITS_PER_SECOND: int = 1000

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "generated_tokens"):
            require(0 <= getattr(self, name) < 2**31, name, getattr(self, name), "0 or more")
        scale = self.SCALING_FACTOR_UNITS_PER_SECOND
        require(0 < scale <= 10**9, "SCALING_FACTOR_UNITS_PER_SECOND", scale, "1 or more")
        names = ("inference_start_ms", "prompt_eval_end_ms", "inference_end_ms")
        for first, second in (names[:2], names[1:], ("model_load_start_ms", "model_load_end_ms")):
            start, end = getattr(self, first), getattr(self, second)
            expected = f"at least {first}={start}; the clock has jumped"
            require(abs(end) < 2**63 and start <= end, second, end, expected)


def parse(out: str, err: str, label: str) -> Run | None:
    """Read the output of llama_main; None if it holds no statistics.

    Args:
        out: Its stdout.
        err: Its stderr.
        label: Name of the program in errors.

    Raises:
        DeviceError: The statistics are damaged or impossible.
    """
    _, found, rest = out.rpartition(STATISTICS)
    if not found:
        return None
    values = read_answer(_Statistics, rest.partition("\n")[0], label)
    per_ms = values.SCALING_FACTOR_UNITS_PER_SECOND / 1e3
    steps = values.generated_tokens
    decoding = (values.inference_end_ms - values.prompt_eval_end_ms) / per_ms
    rss = [round(float(mib) * 1024) for mib in _RSS.findall(out + err)] or [0]
    return Run(
        prompt_tokens=values.prompt_tokens,
        steps=steps,
        load_ms=(values.model_load_end_ms - values.model_load_start_ms) / per_ms,
        prefill_ms=(values.prompt_eval_end_ms - values.inference_start_ms) / per_ms,
        decode_ms=decoding / max(steps, 1),
        rss_kib=(rss[0], max(rss)),
    )


class Prompts:
    """Prompts of an exact number of tokens, made by repeating one short piece of text."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer.json.

        Raises:
            InputError: The file is missing or cannot be read.
        """
        self._path = path
        self._tokenizer = read_backend(path, "device.android.tokenizer=")

    def of_length(self, tokens: int) -> str:
        """Make a text that the tokenizer, without special tokens, splits into `tokens` tokens.

        Raises:
            InputError: No piece of text repeats as single tokens in this vocabulary.
        """
        for piece in _PIECES:
            text = piece * tokens
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            # Some tokenizers drop unknown characters, so the decoded text is compared too.
            if len(ids) == tokens and self._tokenizer.decode(ids).strip() == text.strip():
                return text
        raise InputError(
            f"device.android.tokenizer={self._path}: no piece of text repeats as {tokens} tokens; "
            f"tried {', '.join(map(repr, _PIECES))}"
        )
