"""`Device`: base class of all devices, with the protocol of a measurement.

Latencies vary several times more between processes than within one, so each program is timed in
several fresh processes. Within a process, the runs of all programs and of a fixed reference
alternate, so that a disturbance affects all of them alike. A process that was slow throughout is
rejected and counted.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.device.measurement import Latency, Measurement, Program, accepted, standard_error
from flash.device.program_limits import ProgramLimits
from flash.device.settings import DeviceSettings
from flash.device.workload import Phase, Point, Workload
from flash.errors import InputError

KIB_PER_MIB = 1024

Progress = Callable[[int, int], None]
"""Callback with the number of finished processes and the number of all processes."""


class Device(ABC):
    """Machine that runs programs in fresh processes and times them.

    Subclasses implement the start of one process (`run`) and the identification of the machine
    (`_identify`).
    """

    times_blocks = True
    """True if the device runs single blocks, whose input is activations; else only whole models."""
    runs_texts = True
    """True if the device continues and scores texts; else it only times programs."""

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings
        self._identity: dict[str, str | int] | None = None

    def identity(self) -> dict[str, str | int]:
        """Return conditions of a stored measurement: hardware, system, runtime and threads.

        They are read once and kept, so that the device may be disconnected later.

        Raises:
            InputError: The settings ask for more than the device has, such as threads or CPUs.
            DeviceError: The device does not answer.
        """
        if self._identity is None:
            self._identity = self._identify()
            if self.settings.huge_pages:
                self._identity |= {"huge_pages": 1}
        return self._identity

    def check_huge_pages(self, lack: str) -> None:
        """Check that huge pages are to be had where the settings ask for them.

        Args:
            lack: Reason why the device has none, or "".

        Raises:
            InputError: They are asked for and the device has none.
        """
        if self.settings.huge_pages and lack:
            raise InputError(
                f"device.huge_pages=true: {self.settings.name} has none, as {lack}; expected Linux "
                "with glibc and transparent_hugepage of always or madvise; leave the setting out, "
                "or let an administrator write madvise to "
                "/sys/kernel/mm/transparent_hugepage/enabled"
            )

    @abstractmethod
    def _identify(self) -> dict[str, str | int]:
        """Read the `identity` from the device."""

    def check_unit(self, former: Mapping[str, Any], path: Path) -> None:
        """Check that a file in this device's folder is of this piece of hardware.

        Args:
            former: Identity of the device that the file is of.
            path: The file, which is about to be replaced.

        Raises:
            InputError: It is of another device of the same name.
        """
        unit = self.identity().get("unit")
        if former.get("unit", unit) != unit:
            raise InputError(
                f"device.name={self.settings.name}: {path} is of another device of this name; "
                "expected a name for each; set device.name, or delete the file"
            )

    @property
    def resource(self) -> str:
        """Name of the hardware, for locks: measurements run in parallel only on different ones."""
        return self.settings.name

    @abstractmethod
    def run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        """Run a job of runner.py in one fresh process on the device and return its result.

        Args:
            job: The job object that runner.py documents.
            programs: The programs of the job.

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
        """Time all programs, whose runs alternate in each of several fresh processes.

        Args:
            programs: Programs to measure; their names must differ.
            workload: Latencies to time.
            reference: Fixed program that is timed in the same processes, to distinguish slow
                processes from slow programs; its times are in `conditions`.
            on_progress: Called after each process.

        Raises:
            InputError: A program is missing, the device's runtime refuses it, or the workload is
                longer than its context.
            DeviceError: A process died or took too long.
        """
        everything = [*programs] + ([reference] if reference is not None else [])
        assert len({program.name for program in everything}) == len(everything)
        for program in everything:
            asked = f"a workload of {workload.context} tokens"
            _check_room(program.path, workload.context, asked, "lower device.workload")
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
            _summarize(program.name, results, keep, conditions, workload) for program in programs
        ]

    def generate(
        self, path: Path, tokens: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
    ) -> list[int]:
        """Continue `tokens` greedily; the result holds neither `tokens` nor the stop token."""
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
        """Continue many prompts greedily in one process.

        Args:
            path: The program.
            prompts: Token ids of each prompt, at least one.
            new_tokens: Largest number of tokens of a continuation, at least one.
            stop: Tokens that end a continuation.
            reuse: Whether to keep in the cache the tokens that a prompt shares with the one before
                it; only for programs without sliding windows.

        Returns:
            The continuations, each up to and including its first token of `stop`.

        Raises:
            InputError: A prompt and its continuation are longer than the program's context.
        """
        for prompt in prompts:
            asked = f"a prompt of {len(prompt)} tokens and {new_tokens} new ones"
            _check_room(path, len(prompt) + new_tokens, asked, "shorten the prompt")
        job = {"mode": "generate", "prompts": [list(prompt) for prompt in prompts], "reuse": reuse}
        return self._run_one(path, {**job, "new_tokens": new_tokens, "stop": list(stop)})["answers"]

    def score(
        self, path: Path, tokens: Sequence[int], *, prefill: int = 1, keep_logits: bool = False
    ) -> dict[str, Any]:
        """Score one text with teacher forcing; see `score_many` for the result.

        The first `prefill` tokens are fed in chunks, the others one at a time, as in decoding.
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
        """Score many texts with teacher forcing in one process.

        Args:
            path: The program.
            requests: Tokens of each text, and how many of the first ones are fed in chunks and not
                scored.
            keep_logits: Whether results also hold `logits`.
            reuse: Whether to keep in the cache the tokens that a text's unscored part shares with
                the text before it; only for programs without sliding windows.

        Returns:
            For each text `log_likelihoods` of its scored tokens [nats], and in `choices` the
            likeliest token at each of their positions.

        Raises:
            InputError: A text is longer than the program's context.
        """
        for tokens, _ in requests:
            read = len(tokens) - (not keep_logits)  # else the last token is not fed
            _check_room(path, read, f"a text of {len(tokens)} tokens", "shorten the text")
        texts = [{"tokens": list(tokens), "prefill": prefill} for tokens, prefill in requests]
        job = {"mode": "score", "requests": texts, "keep_logits": keep_logits, "reuse": reuse}
        return self._run_one(path, job)["answers"]

    def timeout_s(self, job: dict[str, Any]) -> float:
        """Time limit of a job's process [s]."""
        settings = self.settings
        programs = len(job["programs"])
        turns = (job.get("warmups", 0) + job.get("runs", 1)) * len(job.get("points", "1"))
        texts = [*job.get("prompts", ()), *(text["tokens"] for text in job.get("requests", ()))]
        tokens = sum(map(len, texts)) + len(texts) * job.get("new_tokens", 0)
        runs = turns * programs + tokens / 100
        return settings.start_timeout_s * programs + settings.run_timeout_s * runs

    def _run_one(self, path: Path, job: dict[str, Any]) -> dict[str, Any]:
        program = Program(name=path.name, path=path, vocab_size=1)
        return self.run({**self._common([program]), **job}, [program])

    def _common(self, programs: Sequence[Program]) -> dict[str, Any]:
        return {
            "threads": self.settings.threads,
            "cpus": self.settings.pinned,
            "programs": [
                {**program.to_job(), "prefill_chunk": self._chunk(program)} for program in programs
            ],
        }

    def _chunk(self, program: Program) -> int:
        """Most tokens of a prefill call: as the file says, or else as the settings do."""
        limits = ProgramLimits.find(program.path)
        return limits.chunk if limits is not None else self.settings.lowering.chunk

    def _job(self, programs: Sequence[Program], workload: Workload) -> dict[str, Any]:
        return {
            **self._common(programs),
            "mode": "measure",
            "warmups": self.settings.warmups,
            "runs": self.settings.runs,
            "points": [[point.phase.value, point.tokens] for point in workload.points],
            "decode_tokens": workload.decode_tokens,
        }

    def _accepted(
        self, results: Sequence[dict[str, Any]], programs: Sequence[Program], workload: Workload
    ) -> list[bool]:
        """Decide for each process whether it took at most `reject_ratio` times as long as the best.

        The sum over all programs decides. A disturbed process is slow throughout, while a slow
        moment of one program does not justify losing the samples of the others.
        """
        passed = [True] * len(results)
        for point in workload.points:
            sums = [sum(_minimum_ms(r, p.name, point) for p in programs) for r in results]
            verdicts = accepted(sums, self.settings.reject_ratio)
            passed = [a and b for a, b in zip(passed, verdicts, strict=True)]
        return passed


def _check_room(path: Path, tokens: int, asked: str, remedy: str) -> None:
    """Check that `tokens` fit the context that the program at `path` was exported with.

    Raises:
        InputError: They do not.
    """
    limits = ProgramLimits.find(path)
    if limits is not None and tokens > limits.context:
        raise InputError(
            f"{path.name}: {asked}: expected at most {limits.context} tokens together, the context "
            f"that it was exported with; {remedy}, or export it with a larger "
            "device.lowering.max_context"
        )


def check_files(programs: Sequence[Program]) -> None:
    """Check that the file of every program exists.

    Raises:
        InputError: A file is missing.
    """
    for program in programs:
        if not program.path.is_file():
            raise InputError(f"{program.path}: no such file; lower the model first")


def check_loaded(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a runner whose runtime loaded all programs.

    Raises:
        InputError: The runtime refused a program.
    """
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


def _summarize(
    name: str,
    results: Sequence[dict[str, Any]],
    keep: Sequence[bool],
    conditions: list[dict[str, Any]],
    workload: Workload,
) -> Measurement:
    """Make the measurement of one program from the results of all processes."""
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
    """Circumstances of one process, for `Measurement.conditions`."""
    fields = ("started", "start_ms", "baseline_rss_kib", "load_average", "process")
    conditions = {name: result[name] for name in fields}
    if reference is not None:
        conditions["reference_ms"] = {
            point.name: _minimum_ms(result, reference.name, point) for point in workload.points
        }
    return {**conditions, **result.get("device", {})}
