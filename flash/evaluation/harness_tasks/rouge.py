"""ROUGE-L, as lm-evaluation-harness asks for it; loaded by the task files beside it.

The F-measure of the longest common subsequence of words, without stemming, as rouge_score's
default. torchmetrics computes it: rouge_score imports absl, whose log handler closes a redirected
stderr as soon as anyone configures logging again.
"""

from collections.abc import Callable
from typing import Any

from torchmetrics.functional.text import rouge_score


def _against(column: str) -> Callable[[dict[str, Any], list[str]], dict[str, float]]:
    def process_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
        scores = rouge_score(answers[0], row[column], rouge_keys="rougeL")
        return {"rougeL": float(scores["rougeL_fmeasure"])}

    return process_results


against_target = _against("target")
against_summary = _against("summary")
