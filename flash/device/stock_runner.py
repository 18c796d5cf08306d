"""Text generation by ExecuTorch's own LLM runner, which shows that a program runs without `flash`.

As a script, `python stock_runner.py model.pte tokenizer.json new_tokens num_bos < prompt` prints
the continuation and then the runner's statistics. `generate_text` runs this script in a child
process.
"""

import sys
from pathlib import Path
from typing import Any

STATISTICS = "\nPyTorchObserver "
"""Separator that the runner prints between the text and its statistics."""


def generate_text(
    path: Path, tokenizer: Path, prompt: str, new_tokens: int, *, threads: int = 1
) -> tuple[str, dict[str, Any]]:
    """Continue `prompt` greedily.

    The runner does not read the post-processor of tokenizer.json, so it is told to put
    begin-of-text in front of the prompt where the tokenizer does.

    Returns:
        The continuation, and the runner's statistics with times in ms. The text ends with the
        end-of-text token if the program stopped there. The runner omits unprintable characters.

    Raises:
        DeviceError: The runner failed, took longer than 10 minutes, or printed no statistics.
    """
    from flash.device.answers import read_answer
    from flash.device.host import run_process
    from flash.device.settings import thread_variables
    from flash.model.tokenizer_json import added_tokens, read_backend

    script = str(Path(__file__))
    prefix, _ = added_tokens(read_backend(tokenizer))
    command = [sys.executable, script, str(path), str(tokenizer), str(new_tokens), str(len(prefix))]
    out, _ = run_process(command, thread_variables(threads), 600.0, path.name, text=prompt)
    text, _, statistics = out.rpartition(STATISTICS)
    return text.rstrip("\n"), read_answer(dict[str, Any], statistics.partition("\n")[0], path.name)


def main(path: str, tokenizer: str, new_tokens: str, num_bos: str) -> None:
    """Continue the prompt on stdin and print the continuation."""
    # Without a callback the runner prints each token itself. A Python callback would fail on tokens
    # that are not valid UTF-8 alone, of which byte-level vocabularies have many.
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from runner import load_operators  # runner.py: this folder is on a script's path

    load_operators()
    config = GenerationConfig(
        max_new_tokens=int(new_tokens), temperature=0.0, echo=False, num_bos=int(num_bos)
    )
    TextLLMRunner(path, tokenizer).generate(sys.stdin.read(), config)


if __name__ == "__main__":
    main(*sys.argv[1:5])
