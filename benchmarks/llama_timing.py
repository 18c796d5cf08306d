"""Times of llama.cpp on a GGUF file, for the benchmarks that compare with it.

    llama_timing.py SETTINGS RESULT

runs in a process of its own, whose settings are the JSON of `LlamaTiming`.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from record import in_fresh_process

FP32, FP16 = 0, 1
"""Numbers of llama.cpp's types of caches."""


@dataclass(frozen=True, kw_only=True)
class LlamaTiming:
    """Prompts and steps to time, and the form in which llama.cpp runs them."""

    path: str
    """GGUF file."""
    vocab_size: int
    """Vocabulary, of which random tokens are taken."""
    prompts: list[int]
    """Lengths of prompts [tokens]."""
    contexts: list[int]
    """Lengths of contexts [tokens]."""
    steps: int
    """Steps after a context."""
    max_context: int
    """Length of the cache [tokens]."""
    threads: int
    """Threads of both phases."""
    cache: int
    """Type of keys and values: `FP32` or `FP16`."""
    flash_attention: bool = False
    """Attend by llama.cpp's fused kernel."""

    def best(self) -> dict[str, float]:
        """Time with flash attention and without; return the faster at each point [s]."""
        ways = [dataclasses.replace(self, flash_attention=way) for way in (False, True)]
        both = [in_fresh_process(__file__, json.dumps(dataclasses.asdict(way))) for way in ways]
        return {point: min(way[point] for way in both) for point in both[0]}

    def run(self) -> dict[str, float]:
        """Time in this process: the fastest of two prompts and of the steps at each point [s]."""
        import llama_cpp

        longest = max(self.prompts)
        runtime = llama_cpp.Llama(
            self.path,
            n_ctx=self.max_context,
            n_batch=longest,
            n_ubatch=min(longest, 512),  # its default
            n_threads=self.threads,
            n_threads_batch=self.threads,
            type_k=self.cache,
            type_v=self.cache,
            flash_attn=self.flash_attention,
            verbose=False,
        )
        length = max(*self.prompts, *self.contexts)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, length).tolist()
        found = {}
        for prompt in self.prompts:
            times = []
            for _ in range(3):  # the first warms up
                runtime.reset()
                start = time.perf_counter()
                runtime.eval(tokens[:prompt])
                times.append(time.perf_counter() - start)
            found[f"prefill_{prompt}"] = min(times[1:])
        for context in self.contexts:
            runtime.reset()
            runtime.eval(tokens[:context])
            times = []
            for _ in range(self.steps):
                start = time.perf_counter()
                runtime.eval([1])
                times.append(time.perf_counter() - start)
            found[f"decode_{context}"] = min(times)
        return found


def is_installed() -> bool:
    """Return True if llama-cpp-python is there; say so if it is not."""
    found = importlib.util.find_spec("llama_cpp") is not None
    if not found:
        print("llama-cpp-python is not installed: nothing is compared with it", file=sys.stderr)
    return found


if __name__ == "__main__":
    timing = LlamaTiming(**json.loads(sys.argv[1]))
    os.environ["OMP_NUM_THREADS"] = str(timing.threads)
    Path(sys.argv[2]).write_text(json.dumps(timing.run()), "utf-8")
