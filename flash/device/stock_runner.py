"""Text through ExecuTorch's own LLM runner: proof that a program needs nothing of `flash` to run.

Run as `python stock_runner.py model.pte tokenizer.json new_tokens < prompt`, it writes the
continuation to stdout, the job's statistics as one line of JSON to stderr, and stops at the
program's end-of-text tokens. `generate_text` does that in a child process.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATISTICS = "flash-statistics "
"""Starts the line of statistics."""


def generate_text(
    path: Path, tokenizer: Path, prompt: str, new_tokens: int, *, threads: int = 1
) -> tuple[str, dict[str, Any]]:
    """The greedy continuation of `prompt` and the runner's statistics, times in ms.

    Raises:
        DeviceError: The runner exited with a code other than 0 or took longer than 10 minutes.
    """
    from flash.device.host import run_process

    command: Sequence[str] = (
        sys.executable,
        str(Path(__file__)),
        str(path),
        str(tokenizer),
        str(new_tokens),
    )
    out, err = run_process(command, threads, 600.0, path.name, text=prompt)
    lines = [line for line in err.splitlines() if line.startswith(STATISTICS)]
    return out, json.loads(lines[-1].removeprefix(STATISTICS))


def main(path: str, tokenizer: str, new_tokens: str) -> None:
    """Generate from the prompt on stdin."""
    # Without a callback of ours the runner prints each token itself. A Python callback fails on
    # any token that is not whole UTF-8 by itself, which byte-level vocabularies are full of.
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from runner import load_operators  # our neighbour: run as a script, this folder is on the path

    load_operators()
    config = GenerationConfig(
        max_new_tokens=int(new_tokens), temperature=0.0, echo=False, num_bos=0, num_eos=0
    )
    statistics: list[str] = []
    runner = TextLLMRunner(path, tokenizer)
    prompt = sys.stdin.read()
    runner.generate(prompt, config, None, lambda stats: statistics.append(stats.to_json_string()))
    print(STATISTICS + statistics[-1], file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4])
