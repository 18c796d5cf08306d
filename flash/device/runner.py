"""Script that runs programs on a device: `python runner.py job.json result.json`.

It needs only the standard library, torch and ExecuTorch's runtime, and nothing of `flash`, so that
a copy of this one file measures on any board with Python. The job is one JSON object:

    COMMON = "threads": 2, "cpus": [2, 3] | null, "programs": [PROGRAM...]
    {"mode": "measure", COMMON, "points": [["prefill", 512], ["decode", 512]],
     "decode_tokens": 16, "warmups": 2, "runs": 3}
    {"mode": "generate", COMMON, "prompts": [[1, 2]], "new_tokens": 8, "stop": [2], "reuse": false}
    {"mode": "score", COMMON, "requests": [{"tokens": [1, 2, 3], "prefill": 1}],
     "keep_logits": true, "reuse": false}
    PROGRAM = {"name": "x", "path": "x.pte", "input": "tokens" | "activations",
               "vocab_size": 2048, "model_dim": 256, "flush_mib": 0, "prefill_chunk": 512}

Prefill is the time from an empty cache to the first token's logits, with the prompt fed in chunks
of the program's `prefill_chunk`. Decoding is timed in single steps at cache positions from the
context on. The contents of the cache do not change the time, so it is not filled first. Before each
timed call, `flush_mib` of other memory are read, which evicts the program from the processor's
caches.

With `reuse`, the tokens that a text shares with the beginning of the text before it are not fed
again. That is correct for programs whose KV caches hold every position, not for those with sliding
windows.
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
"""Clock ticks of /proc/stat [1/s]."""


def status_kib(field):
    """A field of /proc/self/status in KiB; 0 if the system has no such field."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def machine_ticks():
    """Ticks of work of all processors, and ticks stolen by a hypervisor; zeros if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        return user + nice + system + irq + softirq, steal
    except (OSError, ValueError):
        return 0, 0


class Clock:
    """A stopwatch for wall time, processor time of this process and of all others, and steal."""

    def __init__(self):
        self.start = self.now()

    def now(self):
        """Absolute readings; only their differences have a meaning."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        worked, steal = machine_ticks()
        others_s = worked / TICKS_PER_S - usage.ru_utime - usage.ru_stime
        return time.perf_counter(), usage.ru_utime, usage.ru_stime, others_s, steal

    def read(self):
        """Readings since the creation of this clock: seconds, but steal in ticks."""
        names = ("wall_s", "user_s", "system_s", "others_s", "steal_ticks")
        return {n: b - a for n, a, b in zip(names, self.start, self.now(), strict=True)}


class Runnable:
    """A loaded program that can make its own inputs."""

    def __init__(self, spec):
        self.name, self.chunk = spec["name"], spec["prefill_chunk"]
        self.spec = spec
        before = status_kib("VmRSS")
        start = time.perf_counter()
        self.program = load_program(spec["path"])
        self.method = self.program.load_method("forward")  # here XNNPACK packs the weights
        self.load_ms = (time.perf_counter() - start) * 1e3
        self.load_rss_kib = status_kib("VmRSS") - before
        # Ones: untouched zeros would all lie on one page of memory.
        self.ballast = bytearray(b"\1") * (spec["flush_mib"] << 20)

    def inputs(self, count):
        """Make `count` random tokens, or rows of activations, the same in every run."""
        import torch

        generator = torch.Generator().manual_seed(0)
        if self.spec["input"] == "tokens":
            high = self.spec["vocab_size"]
            return torch.randint(0, high, (1, count), generator=generator)
        return torch.randn(1, count, self.spec["model_dim"], generator=generator)

    def flush(self):
        """Read a byte of every cache line of the ballast, which fills the processor's caches."""
        self.ballast[::64].count(0)

    def call(self, x, position):
        """Run the method on inputs that start at a cache position, and return its first output."""
        import torch

        return self.method.call((x, torch.tensor([position])))[0]

    def prefill(self, x):
        """Feed `x` in chunks from position 0 on, and return the output of the last call."""
        out = None
        for start in range(0, x.shape[1], self.chunk):
            out = self.call(x[:, start : start + self.chunk], start)
        return out


def bindings():
    """Import ExecuTorch's native module; the public wrapper also imports the exporter in 8 s."""
    import torch  # noqa: F401  its libraries must be loaded first

    try:
        from executorch.extension.pybindings import _C as native
    except ImportError:  # its name up to 1.4
        from executorch.extension.pybindings import (
            _portable_lib as native,  # pyright: ignore[reportAttributeAccessIssue]
        )
    return native


def load_program(path):
    """Load a file after a check of its structure, without preparing a method."""
    native = bindings()
    checks = native.Verification.InternalConsistency
    return native._load_program(path, program_verification=checks)


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

    Importing their Python packages would take seconds, since these also import the exporter.
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
    """Run all programs in turns, first as warm-ups and then timed, and return the samples.

    A warm-up is one run at the shortest point of each phase, which reads all weights. Longer
    prompts of large models would take too long for a run that is not timed.
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
    """Time one prefill of a prompt of `tokens` tokens."""
    x = program.inputs(tokens)
    program.flush()
    clock = Clock()
    program.prefill(x)
    return clock.read()


def time_decode(job, program, context):
    """Time single-token calls at positions from `context` on; also each step alone [ms]."""
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
    """A program together with the tokens that its KV cache holds."""

    def __init__(self, program, reuse):
        self.program, self.chunk, self.reuse = program, program.chunk, reuse
        self.cached_tokens = []

    def read(self, tokens):
        """Feed a text that starts at position 0, and return the logits after it."""
        import torch

        start = 0
        if self.reuse:
            # The last token is always fed, since it gives the logits.
            known = min(len(self.cached_tokens), len(tokens) - 1)
            same = (self.cached_tokens[i] == tokens[i] for i in range(known))
            start = next((i for i, equal in enumerate(same) if not equal), known)
        out: Any = None
        for first in range(start, len(tokens), self.chunk):
            chunk = tokens[first : first + self.chunk]
            out = self.program.call(torch.tensor([chunk]), first)
        self.cached_tokens = list(tokens)
        return out[0]

    def step(self, token):
        """Feed one more token, and return the logits after it."""
        import torch

        out = self.program.call(torch.tensor([[token]]), len(self.cached_tokens))
        self.cached_tokens.append(token)
        return out[0]


def generate(job, reader):
    """Continue the prompts greedily, each up to and including its first stop token."""
    stop = set(job["stop"])
    answers = []
    for prompt in job["prompts"]:
        out = [int(reader.read(prompt).argmax())]
        while out[-1] not in stop and len(out) < job["new_tokens"]:
            out.append(int(reader.step(out[-1]).argmax()))
        answers.append(out)
    return answers


def score(job, reader):
    """Score each request: the log-likelihoods [nats] of all tokens after the first `prefill` ones.

    The result also holds the likeliest token at each of these positions, and all logits if the job
    asks for them.
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
    """Run a job and return its result object."""
    started = time.time()
    clock = Clock()
    if job["cpus"] and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, job["cpus"])
        except OSError as error:
            sys.exit(f"device.cpus={job['cpus']}: this device does not offer them ({error})")
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
        reader = Reader(programs[0], job["reuse"])
        answer = generate if job["mode"] == "generate" else score
        result["answers"] = answer(job, reader)
    result["peak_rss_kib"] = status_kib("VmHWM")
    result["load_average"] = os.getloadavg()[0]
    result["process"] = clock.read()
    return result


def end_with_parent():
    """Make Linux kill this process when its parent ends, even if the parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(job_path, result_path):
    """Run the job in a file; the file of the result appears completely or not at all."""
    end_with_parent()
    with open(job_path, encoding="utf-8") as file:
        job = json.load(file)
    result = run(job)
    with open(result_path + ".part", "w", encoding="utf-8") as file:
        json.dump(result, file)
    os.replace(result_path + ".part", result_path)


if __name__ == "__main__":
    main(*sys.argv[1:3])
