"""`Device`: the protocol of a measurement, the same wherever the processes run.

Noise between processes is several times that within one, so each program is timed in several fresh
processes; programs and a fixed reference take turns inside each, so that a slow moment hits all
alike; a process slow throughout is thrown away and counted.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flash.device.measurement import Latency, Measurement, Program, accepted, standard_error
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError

KIB_PER_MIB = 1024

Progress = Callable[[int, int], None]
"""Called with processes done and processes in all."""


class Device(ABC):
    """Something that runs a program in a fresh process and times it.

    Kinds of devices say how one process is started (`run`) and who they are (`identity`).
    """

    times_blocks = True
    """Whether it runs programs that take activations, and not only whole models."""

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings
        self._identity: dict[str, str | int] | None = None

    def identity(self) -> dict[str, str | int]:
        """Conditions of a stored measurement: hardware, system, runtime, threads, CPUs.

        The device is asked once; a phone that is unplugged later still has a name.

        Raises:
            InputError: The device cannot do what the settings ask (more threads than cores).
            DeviceError: It does not answer.
        """
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    @abstractmethod
    def _identify(self) -> dict[str, str | int]:
        """Ask the device for its `identity`."""

    @property
    def resource(self) -> str:
        """What two measurements cannot use at once: devices with different ones run in parallel."""
        return self.settings.name

    @abstractmethod
    def run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        """The result of a job of runner.py, in one fresh process on the device.

        Raises:
            InputError: A program is missing, or the device's runtime refuses it.
            DeviceError: The process died or took longer than `timeout_s`.
        """

    def measure(
        self,
        programs: Sequence[Program],
        workload: Workload,
        reference: Program | None = None,
        on_progress: Progress | None = None,
    ) -> list[Measurement]:
        """Time every program; all take turns in each of several fresh processes.

        Args:
            programs: What to measure; each name once.
            workload: What to time.
            reference: A fixed program that takes turns with the others, so that slow processes are
                told from slow programs; its times are in `conditions`.
            on_progress: Called after each process.
        """
        everything = [*programs] + ([reference] if reference is not None else [])
        job = self._job(everything, workload)
        results: list[dict[str, Any]] = []
        total = self.settings.processes
        for done in range(total):
            if done:
                time.sleep(self.settings.pause_s)
            results.append(self.run(job, everything))
            if on_progress is not None:
                on_progress(done + 1, total)
        # A process that was slow throughout gets one replacement; a lasting load does not.
        slow = sum(not ok for ok in self._accepted(results, everything, workload))
        for _ in range(slow):
            results.append(self.run(job, everything))
        keep = self._accepted(results, everything, workload)
        conditions = [_conditions(result, reference, workload) for result in results]
        return [
            _summarise(program.name, results, keep, conditions, workload) for program in programs
        ]

    def generate(
        self, path: Path, tokens: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
    ) -> list[int]:
        """Greedy continuation of `tokens` by the program, without them and without the stop."""
        [answer] = self.generate_many(path, [tokens], new_tokens, stop)
        return answer[:-1] if answer and answer[-1] in stop else answer

    def generate_many(
        self,
        path: Path,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        stop: Sequence[int] = (),
        *,
        reuse: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations in one process, each up to and with its first token of `stop`.

        Args:
            path: The program.
            prompts: Token ids of each, at least one.
            new_tokens: Most tokens of an answer, at least one.
            stop: Tokens that end an answer.
            reuse: Do not read again what a prompt shares with the one before it; only for programs
                without sliding windows.
        """
        job = {"mode": "generate", "prompts": [list(prompt) for prompt in prompts], "reuse": reuse}
        return self._run_one(path, {**job, "new_tokens": new_tokens, "stop": list(stop)})["answers"]

    def score(
        self, path: Path, tokens: Sequence[int], *, prefill: int = 1, keep_logits: bool = False
    ) -> dict[str, Any]:
        """Teacher-forced scores: `log_likelihoods` of `tokens[prefill:]`, and `logits` if kept.

        The first `prefill` tokens go through in chunks, the others one at a time, as in use.
        """
        return self.score_many(path, [(tokens, prefill)], keep_logits=keep_logits)[0]

    def score_many(
        self,
        path: Path,
        requests: Sequence[tuple[Sequence[int], int]],
        *,
        keep_logits: bool = False,
        reuse: bool = False,
    ) -> list[dict[str, Any]]:
        """Teacher-forced scores of many texts in one process.

        Args:
            path: The program.
            requests: Tokens of each text and how many of them go through in chunks, unscored.
            keep_logits: Whether answers have `logits` too.
            reuse: Do not read again what a text's unscored part shares with the text before it;
                only for programs without sliding windows.

        Returns:
            For each the `log_likelihoods` of its other tokens, and in `choices` the likeliest token
            at each of their places.
        """
        texts = [{"tokens": list(tokens), "prefill": prefill} for tokens, prefill in requests]
        job = {"mode": "score", "requests": texts, "keep_logits": keep_logits, "reuse": reuse}
        return self._run_one(path, job)["answers"]

    def timeout_s(self, job: dict[str, Any]) -> float:
        """How long the process of a job may take [s]."""
        settings = self.settings
        programs = len(job["programs"])
        turns = (job.get("warmups", 0) + job.get("runs", 1)) * len(job.get("points", "1"))
        texts = [*job.get("prompts", ()), *(text["tokens"] for text in job.get("requests", ()))]
        tokens = sum(map(len, texts)) + len(texts) * job.get("new_tokens", 0)
        runs = turns * programs + tokens / 100
        return settings.start_timeout_s * programs + settings.run_timeout_s * runs

    def _run_one(self, path: Path, job: dict[str, Any]) -> dict[str, Any]:
        program = Program(name=path.name, path=path, vocab_size=1)
        common = {**self._common([program]), "prefill_chunk": self.settings.lowering.chunk}
        return self.run({**common, **job}, [program])

    def _common(self, programs: Sequence[Program]) -> dict[str, Any]:
        return {
            "threads": self.settings.threads,
            "cpus": self.settings.pinned,
            "programs": [program.to_job() for program in programs],
        }

    def _job(self, programs: Sequence[Program], workload: Workload) -> dict[str, Any]:
        return {
            **self._common(programs),
            "mode": "measure",
            "warmups": self.settings.warmups,
            "runs": self.settings.runs,
            "points": [[point.phase.value, point.tokens] for point in workload.points],
            "prefill_chunk": workload.prefill_chunk,
            "decode_tokens": workload.decode_tokens,
        }

    def _accepted(
        self, results: Sequence[dict[str, Any]], programs: Sequence[Program], workload: Workload
    ) -> list[bool]:
        """Processes that are no slower than `reject_ratio` times the best, over all programs.

        The sum over the programs decides: a disturbed process is slow throughout, and one program's
        unlucky moment is not worth the others' samples.
        """
        passed = [True] * len(results)
        for point in workload.points:
            sums = [sum(_minimum_ms(r, p.name, point) for p in programs) for r in results]
            verdicts = accepted(sums, self.settings.reject_ratio)
            passed = [a and b for a, b in zip(passed, verdicts, strict=True)]
        return passed


def check_files(programs: Sequence[Program]) -> None:
    """An InputError for the first program whose file is not there."""
    for program in programs:
        if not program.path.is_file():
            raise InputError(f"{program.path}: no such file; lower the model first")


def check_loaded(result: dict[str, Any]) -> dict[str, Any]:
    """The result, unless the runner said that its runtime refused a program: an InputError."""
    if "error" in result:
        raise InputError(
            f"{result['error']}; the file is damaged, or made for another version of ExecuTorch "
            f"than the device's {result.get('runtime', 'unknown one')}; lower it again"
        )
    return result


def _minimum_ms(result: dict[str, Any], name: str, point: Point) -> float:
    """Smallest time of one program at one point in one process [ms]."""
    runs = result["samples"][name][point.name]
    if point.phase is Phase.prefill:
        return min(run["wall_s"] for run in runs) * 1e3
    return min(min(run["steps_ms"]) for run in runs)


def _summarise(
    name: str,
    results: Sequence[dict[str, Any]],
    keep: Sequence[bool],
    conditions: list[dict[str, Any]],
    workload: Workload,
) -> Measurement:
    kept = [result for result, ok in zip(results, keep, strict=True) if ok]
    latencies = {}
    for point in workload.points:
        minima = [_minimum_ms(result, name, point) for result in kept]
        latencies[point.name] = Latency(ms=min(minima), se_ms=standard_error(minima))
    return Measurement(
        name=name,
        latencies=latencies,
        load_ms=min(result["load_ms"][name] for result in kept),
        peak_rss_mib=min(result["peak_rss_kib"] for result in kept) / KIB_PER_MIB,
        model_rss_mib=min(result["load_rss_kib"][name] for result in kept) / KIB_PER_MIB,
        rejected=len(results) - len(kept),
        samples=[
            {"accepted": ok, **result["samples"][name]}
            for result, ok in zip(results, keep, strict=True)
        ],
        conditions=conditions,
    )


def _conditions(
    result: dict[str, Any], reference: Program | None, workload: Workload
) -> dict[str, Any]:
    fields = ("started", "start_ms", "baseline_rss_kib", "load_average", "process")
    conditions = {name: result[name] for name in fields}
    if reference is not None:
        conditions["reference_ms"] = {
            point.name: _minimum_ms(result, reference.name, point) for point in workload.points
        }
    return {**conditions, **result.get("device", {})}
