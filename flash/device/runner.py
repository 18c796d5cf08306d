"""The program that runs on the device: `python runner.py job.json result.json`.

It needs only the standard library, torch and ExecuTorch's runtime, and nothing of `flash`, so that
one copied file measures on any board with Python. The job is one JSON object:

    COMMON = "threads": 2, "cpus": [2, 3] | null, "programs": [PROGRAM...], "prefill_chunk": 512
    {"mode": "measure", COMMON, "points": [["prefill", 512], ["decode", 512]],
     "decode_tokens": 16, "warmups": 2, "runs": 3}
    {"mode": "generate", COMMON, "prompts": [[1, 2]], "new_tokens": 8, "stop": [2], "reuse": false}
    {"mode": "score", COMMON, "requests": [{"tokens": [1, 2, 3], "prefill": 1}],
     "keep_logits": true, "reuse": false}
    PROGRAM = {"name": "x", "path": "x.pte", "input": "tokens" | "activations",
               "vocab_size": 2048, "model_dim": 256, "flush_mib": 0}

Prefill is the time from an empty cache to the first token's logits, the prompt fed in chunks of
`prefill_chunk`. A decode step is one token at a cache position of the context and above; what the
cache holds does not change the time, so it is not filled first. Before each timed call of a program
with `flush_mib` that much memory is walked through, which evicts the program from the caches.

With `reuse` a text that begins like the one before it is read only from where they differ. That is
right for programs whose caches hold every position, not for those with sliding windows.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def status_kib(field):
    """A field of /proc/self/status in KiB, 0 where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def machine_ticks():
    """Ticks that all processors worked, and that a hypervisor kept from them; zeros if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        return user + nice + system + irq + softirq, steal
    except (OSError, ValueError):
        return 0, 0


class Clock:
    """Time from its creation on: wall, our own on a processor, everybody else's, and steal."""

    def __init__(self):
        self.start = self.now()

    def now(self):
        """Readings since some fixed moment."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        worked, steal = machine_ticks()
        others_s = worked / TICKS_PER_S - usage.ru_utime - usage.ru_stime
        return time.perf_counter(), usage.ru_utime, usage.ru_stime, others_s, steal

    def read(self):
        """The readings since the start; seconds, steal in ticks."""
        names = ("wall_s", "user_s", "system_s", "others_s", "steal_ticks")
        return {n: b - a for n, a, b in zip(names, self.start, self.now(), strict=True)}


class Runnable:
    """A loaded program with the inputs that it takes."""

    def __init__(self, spec):
        native = bindings()
        self.name = spec["name"]
        self.spec = spec
        before = status_kib("VmRSS")
        start = time.perf_counter()
        checks = native.Verification.InternalConsistency
        self.program = native._load_program(spec["path"], program_verification=checks)
        self.method = self.program.load_method("forward")  # here XNNPACK packs the weights
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.load_rss_kib = status_kib("VmRSS") - before
        # Ones: untouched zeros would all lie on one page of memory.
        self.ballast = bytearray(b"\1") * (spec["flush_mib"] << 20)

    def inputs(self, count):
        """`count` tokens, or as many rows of activations, that repeat from run to run."""
        import torch

        generator = torch.Generator().manual_seed(0)
        if self.spec["input"] == "tokens":
            high = self.spec["vocab_size"]
            return torch.randint(0, high, (1, count), generator=generator)
        return torch.randn(1, count, self.spec["model_dim"], generator=generator)

    def flush(self):
        """Walk through the ballast, a byte of each cache line, so that the caches hold that."""
        self.ballast[::64].count(0)

    def call(self, x, position):
        """Run the method on inputs that start at a cache position; its first output."""
        import torch

        return self.method.call((x, torch.tensor([position])))[0]

    def prefill(self, x, chunk):
        """Feed all of `x` from position 0; the last call's output."""
        out = None
        for start in range(0, x.shape[1], chunk):
            out = self.call(x[:, start : start + chunk], start)
        return out


def bindings():
    """ExecuTorch's native module: the public wrapper also imports the exporter, 8 s of it."""
    import torch  # noqa: F401  its libraries must be loaded first

    try:
        from executorch.extension.pybindings import _C as native
    except ImportError:  # its name up to 1.4
        from executorch.extension.pybindings import (
            _portable_lib as native,  # pyright: ignore[reportAttributeAccessIssue]
        )
    return native


def runtime_version():
    """Version of the installed ExecuTorch."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"executorch {version('executorch')}"
    except PackageNotFoundError:
        return "executorch of unknown version"


def prepare(threads):
    """Load the runtime with its operators and fix the size of its thread pool."""
    import torch

    torch.set_num_threads(threads)
    native = bindings()
    load_operators()
    # Before the first program is loaded; afterwards it crashes.
    native._unsafe_reset_threadpool(threads)


def load_operators():
    """Load the libraries with `llama::*` and the quantised embedding.

    The Python packages that they lie in would import the exporter as well: seconds.
    """
    import executorch
    import torch

    for root in executorch.__path__:
        for package in ("extension/llm/custom_ops", "kernels/quantized"):
            folder = os.path.join(root, package)
            for name in sorted(os.listdir(folder)):
                if "aot_lib" in name and name.endswith((".so", ".dylib")):
                    torch.ops.load_library(os.path.join(folder, name))


def measure(job, programs):
    """Warm-ups, then timed runs, programs taking turns so that slow moments hit all alike.

    A warm-up is one run at the shortest point of each phase, which touches all weights; longer
    prompts of large models take too long to be run for nothing.
    """
    points = [tuple(point) for point in job["points"]]
    shortest = {phase: min(n for p, n in points if p == phase) for phase, _ in points}
    samples = {p.name: {f"{phase}_{n}": [] for phase, n in points} for p in programs}
    for turn in range(job["warmups"] + job["runs"]):
        warm = turn >= job["warmups"]
        for program in programs:
            for phase, tokens in points if warm else shortest.items():
                timed = time_prefill if phase == "prefill" else time_decode
                sample = timed(job, program, tokens)
                if warm:
                    samples[program.name][f"{phase}_{tokens}"].append(sample)
    return samples


def time_prefill(job, program, tokens):
    """One prefill of a prompt of `tokens`."""
    x = program.inputs(tokens)
    program.flush()
    clock = Clock()
    program.prefill(x, job["prefill_chunk"])
    return clock.read()


def time_decode(job, program, context):
    """Single-token calls from `context` on; adds the time of each step."""
    x = program.inputs(1)
    steps = []
    clock = Clock()
    for step in range(job["decode_tokens"]):
        program.flush()
        start = time.perf_counter()
        program.call(x, context + step)
        steps.append((time.perf_counter() - start) * 1e3)
    return {**clock.read(), "steps_ms": steps}


class Reader:
    """Feeds texts to a program and knows what its cache holds of them."""

    def __init__(self, program, chunk, reuse):
        self.program, self.chunk, self.reuse = program, chunk, reuse
        self.held = []

    def read(self, tokens):
        """Logits after a text that starts at position 0."""
        import torch

        start = 0
        if self.reuse:
            # The last token is read in any case: it gives the logits.
            known = min(len(self.held), len(tokens) - 1)
            same = (self.held[i] == tokens[i] for i in range(known))
            start = next((i for i, equal in enumerate(same) if not equal), known)
        out: Any = None
        for first in range(start, len(tokens), self.chunk):
            chunk = tokens[first : first + self.chunk]
            out = self.program.call(torch.tensor([chunk]), first)
        self.held = list(tokens)
        return out[0]

    def step(self, token):
        """Logits after one token more."""
        import torch

        out = self.program.call(torch.tensor([[token]]), len(self.held))
        self.held.append(token)
        return out[0]


def generate(job, reader):
    """Greedy continuations of the prompts, each up to and with its first stop token."""
    stop = set(job["stop"])
    answers = []
    for prompt in job["prompts"]:
        out = [int(reader.read(prompt).argmax())]
        while out[-1] not in stop and len(out) < job["new_tokens"]:
            out.append(int(reader.step(out[-1]).argmax()))
        answers.append(out)
    return answers


def score(job, reader):
    """For each request the log-likelihood of each token after the first `prefill`.

    Also the token that the program finds likeliest there, and all logits if asked for.
    """
    import torch

    answers = []
    for request in job["requests"]:
        prefill = request["prefill"]
        rest = request["tokens"][prefill:]
        logits = reader.read(request["tokens"][:prefill])
        kept, scores, choices = [], [], []
        for i, token in enumerate([*rest, None]):
            if job["keep_logits"]:
                kept.append(logits.tolist())
            if token is None:
                break
            scores.append(float(torch.log_softmax(logits.double(), dim=-1)[token]))
            choices.append(int(logits.argmax()))
            if i < len(rest) - 1 or job["keep_logits"]:
                logits = reader.step(token)
        answers.append({"log_likelihoods": scores, "choices": choices, "logits": kept})
    return answers


def run(job):
    """The result object of a job."""
    started = time.time()
    clock = Clock()
    if job["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cpus"])
    prepare(job["threads"])
    result: dict[str, Any] = {"started": started, "start_ms": clock.read()["wall_s"] * 1e3}
    result["runtime"] = runtime_version()
    result["baseline_rss_kib"] = status_kib("VmRSS")
    programs = []
    for spec in job["programs"]:
        try:
            programs.append(Runnable(spec))
        except RuntimeError as error:
            return {**result, "error": f"{spec['name']}: cannot be loaded ({error})"}
    result["load_ms"] = {p.name: p.load_ms for p in programs}
    result["load_rss_kib"] = {p.name: p.load_rss_kib for p in programs}
    if job["mode"] == "measure":
        result["samples"] = measure(job, programs)
    else:
        reader = Reader(programs[0], job["prefill_chunk"], job["reuse"])
        answer = generate if job["mode"] == "generate" else score
        result["answers"] = answer(job, reader)
    result["peak_rss_kib"] = status_kib("VmHWM")
    result["load_average"] = os.getloadavg()[0]
    result["process"] = clock.read()
    return result


def end_with_parent():
    """Have Linux kill this process when its parent ends, which may itself have been killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(job_path, result_path):
    """Read the job, run it, write the result in one step."""
    end_with_parent()
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    result = run(job)
    with open(result_path + ".part", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(result_path + ".part", result_path)


if __name__ == "__main__":
    main(*sys.argv[1:3])
