"""ROUGE-L, as lm-evaluation-harness asks for it; loaded by the task files beside it.

The F-measure of the longest common subsequence of words, without stemming: rouge_score's defaults.
"""

from collections.abc import Callable
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

_SCORER = RougeScorer(["rougeL"])


def _against(column: str) -> Callable[[dict[str, Any], list[str]], dict[str, float]]:
    def process_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
        return {"rougeL": _SCORER.score(row[column], answers[0])["rougeL"].fmeasure}

    return process_results


against_target = _against("target")
against_summary = _against("summary")
