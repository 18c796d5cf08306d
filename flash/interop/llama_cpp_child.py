"""Logits of a GGUF file by llama.cpp, in a process of its own, as its faults end the process.

    llama_cpp_child.py FILE TOKENS LOGITS

TOKENS is a .npy file of token ids `[n]`, LOGITS the .npy file to write, `[n, vocab]`. The first
half of the text is evaluated as a prompt, the rest token by token. Keys and values are cached in
float32, so that only the file can differ; llama.cpp's default is float16.
"""

import importlib
import sys

import numpy as np

F32 = 0
"""llama.cpp's number of the type float32 (`GGML_TYPE_F32`)."""


def main(path: str, tokens: str, logits: str) -> None:
    """Evaluate the tokens; the exit code is 1 with a message if llama.cpp refuses the file."""
    llama_cpp = importlib.import_module("llama_cpp")  # an optional package
    ids = np.load(tokens).tolist()
    try:
        runtime = llama_cpp.Llama(
            path,
            n_ctx=len(ids),
            n_batch=len(ids),
            logits_all=True,
            type_k=F32,
            type_v=F32,
            verbose=False,
        )
    except ValueError as error:
        sys.exit(f"llama.cpp does not load it ({error})")
    runtime.eval(ids[: len(ids) // 2])
    for token in ids[len(ids) // 2 :]:
        runtime.eval([token])
    np.save(logits, runtime.scores[: len(ids)])


if __name__ == "__main__":
    main(*sys.argv[1:])
