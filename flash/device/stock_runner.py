"""Text through ExecuTorch's own LLM runner: proof that a program needs nothing of `flash` to run.

As a script, `python stock_runner.py model.pte tokenizer.json new_tokens < prompt` prints the
continuation and then the runner's statistics; `generate_text` does that in a child process.
"""

import json
import sys
from pathlib import Path
from typing import Any

STATISTICS = "\nPyTorchObserver "
"""What the runner prints between the text and its statistics."""


def generate_text(
    path: Path, tokenizer: Path, prompt: str, new_tokens: int, *, threads: int = 1
) -> tuple[str, dict[str, Any]]:
    """The greedy continuation of `prompt` and the runner's statistics, times in ms.

    The text ends with the end-of-text piece if the program stopped there. The runner leaves out
    what is not printable. A runner that fails or takes longer than 10 minutes is a DeviceError.
    """
    from flash.device.host import run_process

    script = str(Path(__file__))
    command = [sys.executable, script, str(path), str(tokenizer), str(new_tokens)]
    out, _ = run_process(command, threads, 600.0, path.name, text=prompt)
    text, _, statistics = out.rpartition(STATISTICS)
    return text.rstrip("\n"), json.loads(statistics)


def main(path: str, tokenizer: str, new_tokens: str) -> None:
    """Generate from the prompt on stdin."""
    # Without a callback of ours the runner prints each token itself. A Python callback fails on
    # any token that is not whole UTF-8 by itself, which byte-level vocabularies are full of.
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from runner import load_operators  # our neighbour: run as a script, this folder is on the path

    load_operators()
    config = GenerationConfig(max_new_tokens=int(new_tokens), temperature=0.0, echo=False)
    TextLLMRunner(path, tokenizer).generate(sys.stdin.read(), config)


if __name__ == "__main__":
    main(*sys.argv[1:4])
