"""Scores of code, loaded by the task files of this folder; the code runs in flash's sandbox."""

from typing import Any

from flash.evaluation.sandbox import passes


def _score(row: dict[str, Any], solution: str) -> dict[str, float]:
    program = f"{row['prompt']}{solution}\n{row['test']}\ncheck({row['entry_point']})"
    return {"pass@1": float(passes(program))}


def completion(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Score of the text that goes on from the prompt."""
    return _score(row, answers[0])


def answer(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Score of an answer that goes on from the prompt, up to the end of its block of code."""
    return _score(row, answers[0].partition("```")[0])
