"""ROUGE-L for lm-evaluation-harness, loaded by the task files of this folder.

ROUGE-L is the F-measure of the longest common subsequence of words, without stemming, as is the
default of rouge_score. It is computed by torchmetrics, because rouge_score imports absl, whose log
handler closes a redirected stderr when logging is configured again.
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
