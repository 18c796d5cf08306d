"""Suites that come with flash, against the task files of the harness and the paper's averages."""

from pathlib import Path

import lm_eval
import pytest
from omegaconf import OmegaConf

from flash.config import CONF
from flash.evaluation.tasks import OWN_TASKS, SANDBOXED_TASKS

FOLDERS = [
    "hellaswag",
    "super_glue",
    "piqa",
    "siqa",
    "triviaqa",
    "nq_open",
    "arc",
    "winogrande",
    "mmlu",
    "mbpp",
    "humaneval",
]


@pytest.mark.parametrize("suite", ["paper_base", "paper_chat"])
def test_the_papers_suites_name_tasks_and_metrics_of_the_harness(suite):
    """Compare with the task files of the harness, read without their data."""
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [OWN_TASKS, SANDBOXED_TASKS, *(root / name for name in FOLDERS)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    for task in OmegaConf.load(CONF / "suite" / f"{suite}.yaml").tasks:
        about = manager.task_index[task.name].cfg or {}
        metric, chosen = task.metric.split(",")
        listed = about.get("metric_list") or about["aggregate_metric_list"]
        names = {Path(each["metric"]).name.removeprefix("utils.") for each in listed}
        assert metric in names
        assert chosen in {each["name"] for each in about.get("filter_list", [{"name": "none"}])}
        assert set(task.paper) <= {"Flash-350M", "Flash-650M", "Flash-1.4B"}


def test_humaneval_is_asked_as_the_harness_does():
    from lm_eval.tasks import TaskManager

    folders = [SANDBOXED_TASKS, Path(lm_eval.__file__).parent / "tasks" / "humaneval"]
    manager = TaskManager(include_path=folders, include_defaults=False)
    ours, theirs = (
        manager.task_index[name].cfg or {} for name in ("humaneval_sandboxed", "humaneval")
    )
    for key in ("dataset_path", "test_split", "doc_to_text", "output_type", "num_fewshot"):
        assert ours[key] == theirs[key]
    assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]


def test_the_papers_figures_have_its_averages():
    tasks = OmegaConf.load(CONF / "suite" / "paper_base.yaml").tasks
    means = [sum(task.paper[model] for task in tasks) / 9 for model in tasks[0].paper]
    assert means == pytest.approx([45.46, 48.57, 55.06], abs=0.006)
