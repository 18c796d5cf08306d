"""`HostDevice`: this machine as a device, each measurement in fresh processes of runner.py."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flash.device.measurement import Measurement, Program, accepted, standard_error
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.lowering.noise import is_noise

RUNNER = Path(__file__).with_name("runner.py")
KIB_PER_MIB = 1024

Progress = Callable[[int, int], None]
"""Called with processes done and processes in all."""


class DeviceError(RuntimeError):
    """A process on the device died or took too long; names the programs that it ran."""


class HostDevice:
    """The machine that this process runs on."""

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings

    def identity(self) -> dict[str, str | int]:
        """What a stored measurement is valid for."""
        return {
            "device": self.settings.name,
            "cpu": _cpu_name(),
            "cores": os.cpu_count() or 1,
            "threads": self.settings.threads,
            "system": f"{platform.system()} {platform.machine()}",
            "runtime": f"executorch {version('executorch')}",
        }

    def measure(
        self,
        programs: Sequence[Program],
        workload: Workload,
        reference: Program | None = None,
        on_progress: Progress | None = None,
    ) -> list[Measurement]:
        """Time every program; all take turns in each of several fresh processes.

        A process that dies or takes too long is a DeviceError.

        Args:
            programs: What to measure; each name once.
            workload: What to time.
            reference: A fixed program that takes turns with the others, so that slow processes are
                told from slow programs; its times are in `conditions`.
            on_progress: Called after each process.
        """
        everything = [*programs] + ([reference] if reference is not None else [])
        results: list[dict[str, Any]] = []
        total = self.settings.processes
        for done in range(total):
            results.append(self._run(self._job(everything, workload), everything))
            if on_progress is not None:
                on_progress(done + 1, total)
        # A process that was slow throughout gets one replacement; a lasting load does not.
        slow = sum(not ok for ok in self._accepted(results, everything))
        for _ in range(slow):
            results.append(self._run(self._job(everything, workload), everything))
        keep = self._accepted(results, everything)
        conditions = [_conditions(result, reference) for result in results]
        return [_summarise(program.name, results, keep, conditions) for program in programs]

    def generate(
        self, path: Path, tokens: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
    ) -> list[int]:
        """Greedy continuation of `tokens` by the program, without them."""
        job = {"mode": "generate", "tokens": list(tokens), "new_tokens": new_tokens}
        return self._run_one(path, {**job, "stop": list(stop)})["tokens"]

    def score(
        self, path: Path, tokens: Sequence[int], *, prefill: int = 1, keep_logits: bool = False
    ) -> dict[str, Any]:
        """Teacher-forced scores: `log_likelihoods` of `tokens[prefill:]`, and `logits` if kept.

        The first `prefill` tokens go through in chunks, the others one at a time, as in use.
        """
        job = {"mode": "score", "tokens": list(tokens), "prefill": prefill}
        return self._run_one(path, {**job, "keep_logits": keep_logits})

    def _run_one(self, path: Path, job: dict[str, Any]) -> dict[str, Any]:
        program = Program(name=path.name, path=path, vocab_size=1)
        common = {
            "threads": self.settings.threads,
            "programs": [program.to_job()],
            "prefill_chunk": self.settings.lowering.chunk,
        }
        return self._run({**common, **job}, [program])

    def _job(self, programs: Sequence[Program], workload: Workload) -> dict[str, Any]:
        return {
            "mode": "measure",
            "programs": [program.to_job() for program in programs],
            "warmups": self.settings.warmups,
            "runs": self.settings.runs,
            **workload.to_dict(),
        }

    def _accepted(
        self, results: Sequence[dict[str, Any]], programs: Sequence[Program]
    ) -> list[bool]:
        """Processes that are no slower than `reject_ratio` times the best, over all programs.

        The sum over the programs decides: a disturbed process is slow throughout, and one program's
        unlucky moment is not worth the others' samples.
        """
        kinds = ("ttft", "decode")
        passed = [True] * len(results)
        for kind in kinds:
            sums = [sum(_minimum(r, p.name, kind) for p in programs) for r in results]
            verdicts = accepted(sums, self.settings.reject_ratio)
            passed = [a and b for a, b in zip(passed, verdicts, strict=True)]
        return passed

    def _run(self, job: dict[str, Any], programs: Sequence[Program]) -> dict[str, Any]:
        for program in programs:
            if not program.path.is_file():
                raise InputError(f"{program.path}: no such file; lower the model first")
        runs = (job.get("warmups", 0) + job.get("runs", 1)) * len(programs)
        tokens = len(job.get("tokens", ())) + job.get("new_tokens", 0)
        timeout = self.settings.start_timeout_s * len(programs) + self.settings.run_timeout_s * (
            runs + tokens / 100
        )
        with tempfile.TemporaryDirectory(prefix="flash-") as folder:
            job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
            job_path.write_text(json.dumps(job), encoding="utf-8")
            command = [sys.executable, str(RUNNER), str(job_path), str(result_path)]
            what = ", ".join(program.name for program in programs)
            run_process(command, job["threads"], timeout, what)
            result = json.loads(result_path.read_text(encoding="utf-8"))
        if "error" in result:
            raise InputError(f"{result['error']}; the file is damaged or of another version")
        return result


def run_process(
    command: Sequence[str], threads: int, timeout_s: float, what: str, text: str = ""
) -> tuple[str, str]:
    """Run one child to its end and return its stdout and stderr; it dies with us.

    Args:
        command: Program and arguments.
        threads: Size of the thread pools of BLAS and OpenMP.
        timeout_s: It is killed after this time [s].
        what: Named in errors.
        text: Its stdin.

    Raises:
        DeviceError: It exited with a code other than 0 or took longer than `timeout_s`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as child:
        try:
            out, err = child.communicate(text, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise DeviceError(f"{what}: no result after {timeout_s:.0f} s") from None
        except BaseException:  # Ctrl-C included: leave no process behind
            child.kill()
            child.wait()
            raise
    if child.returncode != 0:
        lines = [line for line in err.splitlines() if line.strip() and not is_noise(line)]
        reason = " | ".join(lines[-3:]) or "it printed nothing"
        raise DeviceError(f"{what}: the runner exited with code {child.returncode}: {reason}")
    return out, err


def _minimum(result: dict[str, Any], name: str, kind: str) -> float:
    """Smallest time of one program in one process [ms]."""
    runs = result["samples"][name][kind]
    if kind == "ttft":
        return min(run["wall_s"] for run in runs) * 1e3
    return min(min(run["steps_ms"]) for run in runs)


def _summarise(
    name: str,
    results: Sequence[dict[str, Any]],
    keep: Sequence[bool],
    conditions: list[dict[str, Any]],
) -> Measurement:
    kept = [result for result, ok in zip(results, keep, strict=True) if ok]
    ttft = [_minimum(result, name, "ttft") for result in kept]
    decode = [_minimum(result, name, "decode") for result in kept]
    return Measurement(
        name=name,
        ttft_ms=min(ttft),
        ttft_se_ms=standard_error(ttft),
        decode_ms=min(decode),
        decode_se_ms=standard_error(decode),
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


def _conditions(result: dict[str, Any], reference: Program | None) -> dict[str, Any]:
    fields = ("started", "start_ms", "baseline_rss_kib", "load_average", "process")
    conditions = {name: result[name] for name in fields}
    if reference is not None:
        for kind in ("ttft", "decode"):
            conditions[f"reference_{kind}_ms"] = _minimum(result, reference.name, kind)
    return conditions


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
