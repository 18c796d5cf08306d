"""Answers of a board's Python, read by their types: its description, and results of runner.py."""

from dataclasses import dataclass
from typing import Any, TypeVar, cast

from flash.device.processes import brief
from flash.errors import DeviceError, InputError, is_number, require
from flash.records import parse_json

T = TypeVar("T")
_MOST_CORES = 4096
_LONGEST_NAME = 500
_SLACK_S = 5.0
"""Time by which the clocks of two machines may differ over one job [s]."""


@dataclass(frozen=True)
class Probe:
    """Description of a machine, as system_info.py prints it."""

    cpu: str
    cores: int
    system: str
    runtime: str
    no_huge_pages: str

    def __post_init__(self) -> None:
        expected = f"1 to {_MOST_CORES}"
        require(1 <= self.cores <= _MOST_CORES, "cores", self.cores, expected)
        for name in ("cpu", "system", "runtime", "no_huge_pages"):
            text = getattr(self, name)
            legal = text.isprintable() and len(text) <= _LONGEST_NAME
            require(legal, name, brief(text), f"printable text of at most {_LONGEST_NAME} letters")
        for name in ("cpu", "system"):
            require(bool(getattr(self, name).strip()), name, "", "a name")


@dataclass(frozen=True)
class _Head:
    """Part of all results: a refused program, if there is one, and the runtime."""

    error: str | None = None
    runtime: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Timings:
    """Result of the mode `measure`."""

    started: float
    start_ms: float
    runtime: str
    baseline_rss_kib: int
    load_ms: dict[str, float]
    load_rss_kib: dict[str, int]
    samples: dict[str, dict[str, list[dict[str, int | float | list[float]]]]]
    peak_rss_kib: int
    load_average: float
    process: dict[str, int | float]


@dataclass(frozen=True)
class _Score:
    """Score of one text."""

    log_likelihoods: list[float]
    choices: list[int]
    logits: list[list[float]]


@dataclass(frozen=True)
class _Continued:
    """Result of the mode `generate`."""

    answers: list[list[int]]


@dataclass(frozen=True)
class _Scored:
    """Result of the mode `score`."""

    answers: list[_Score]


def read_answer(schema: type[T], text: str, label: str) -> T:
    """Parse JSON that a device has sent.

    Args:
        schema: Class of the value.
        text: The JSON.
        label: Name of the device or its work in errors.

    Raises:
        DeviceError: It is not JSON, or a value is missing, of another type, or refused.
    """
    try:
        return parse_json(schema, text)
    except InputError as error:
        raise _nonsense(label, str(error)) from error


def _nonsense(label: str, problem: str) -> DeviceError:
    return DeviceError(f"{label}: the device answers with nonsense: {brief(problem)}")


def read_result(text: str, job: dict[str, Any], label: str) -> dict[str, Any]:
    """Read the result of a job of runner.py, which has all that the job asks for.

    Args:
        text: Its JSON.
        job: The job.
        label: Name of the job's programs in errors.

    Returns:
        The result, or `error` and `runtime` if a program was refused.

    Raises:
        DeviceError: It is damaged, incomplete, or holds impossible values.
    """
    head = read_answer(_Head, text, label)
    if head.error is not None:
        return {"error": brief(head.error), "runtime": head.runtime or "unknown one"}
    match job["mode"]:
        case "measure":
            timings = read_answer(_Timings, text, label)
            problem = _lack_of_timings(timings, job)
            result = vars(timings)
        case "generate":
            continued = read_answer(_Continued, text, label)
            problem = _lack_of_continuations(continued.answers, job)
            result = vars(continued)
        case _:
            scored = read_answer(_Scored, text, label)
            problem = _lack_of_scores(scored.answers, job)
            result = {"answers": [vars(score) for score in scored.answers]}
    if problem is not None:
        raise _nonsense(label, problem)
    return result


def _lack_of_timings(timings: _Timings, job: dict[str, Any]) -> str | None:
    names = [program["name"] for program in job["programs"]]
    for name in names:
        loaded = timings.load_ms.get(name)
        if not is_number(loaded) or name not in timings.load_rss_kib:
            return f"no time or memory of loading {name}"
        for phase, tokens in job["points"]:
            runs = timings.samples.get(name, {}).get(f"{phase}_{tokens}", [])
            if len(runs) != job["runs"]:
                return f"{len(runs)} samples of {phase}_{tokens} of {name}, not {job['runs']}"
            for run in runs:
                steps = run.get("steps_ms", [1.0] if phase == "prefill" else [])
                times = [run.get("wall_s"), *(steps if isinstance(steps, list) else [None])]
                wrong = [each for each in times if not is_number(each) or cast(float, each) <= 0]
                if wrong or not steps:
                    found = f"of {phase}_{tokens} of {name}: {brief(str([*wrong, steps][0]))}"
                    return f"times {found}: expected above 0; its clock may jump"
    return None


def _lack_of_continuations(answers: list[list[int]], job: dict[str, Any]) -> str | None:
    if len(answers) != len(job["prompts"]):
        return f"{len(answers)} continuations of {len(job['prompts'])} prompts"
    for answer in answers:
        if not 1 <= len(answer) <= job["new_tokens"] or min(answer) < 0:
            return f"a continuation {brief(str(answer[:9]))} of 1 to {job['new_tokens']} tokens"
    return None


def _lack_of_scores(answers: list[_Score], job: dict[str, Any]) -> str | None:
    if len(answers) != len(job["requests"]):
        return f"scores of {len(answers)} texts, not {len(job['requests'])}"
    for answer, request in zip(answers, job["requests"], strict=True):
        scored = len(request["tokens"]) - request["prefill"]
        if not len(answer.log_likelihoods) == len(answer.choices) == scored:
            return f"scores of {len(answer.log_likelihoods)} tokens, not {scored}"
    return None


def check_clock(claimed_s: float, elapsed_s: float, label: str) -> None:
    """Check times of another machine against the time that has passed here.

    Args:
        claimed_s: Sum of times that were measured one after another there [s].
        elapsed_s: Time that the whole job took here [s].
        label: Name of the device or its work in errors.

    Raises:
        DeviceError: More time has passed there than here, so that its times mean nothing.
    """
    if claimed_s > 1.1 * elapsed_s + _SLACK_S:
        raise DeviceError(
            f"{label}: the device's clock says {claimed_s:.3g} s, but {elapsed_s:.3g} s have "
            "passed here; its clock jumps or runs too fast; run the same command again"
        )


def claimed_s(result: dict[str, Any]) -> float:
    """Sum of the times of all runs in a result of runner.py [s]."""
    points = [point for points in result.get("samples", {}).values() for point in points.values()]
    return sum(run["wall_s"] for runs in points for run in runs)
