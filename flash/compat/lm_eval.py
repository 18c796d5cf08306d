"""lm-evaluation-harness: scoring of tokens, text windows, generation settings, loading of tasks.

Names that the harness 0.4.13 does not document, and the reasons to use them:

- `TemplateLM._loglikelihood_tokens`: the abstract method that a model with a tokenizer of its own
  implements.
- `lm_eval.models.utils.normalize_gen_kwargs`, `lm_eval.utils.get_rolling_token_windows` and
  `make_disjoint_window`: the rules of the harness's own `hf` model, so that results agree with it.
- `TaskManager.all_tasks` and `task_index`: the names of all tasks, and the content of their YAML
  files.
- The dictionaries that `TaskManager.load` accepts and returns: an inline group can override the
  file of a task, and tasks are configured between loading and `evaluate`.
- `Task._filters`, `aggregation`, `higher_is_better`, `config.process_results`, and
  `Group.aggregate_metric_list`: the keys of results, before a model has answered.
- `lm_eval.api.task.tqdm`: its bar over the questions cannot be turned off.

Import this module only to run a benchmark, since the import of the harness takes a second.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task as task_module
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of the continuation to score."""


class TokenScoringLM(TemplateLM):
    """Base class of models for the harness; subclasses implement `score_pairs`."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # Without the harness's bar for the tokenization, which takes a second.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self.score_pairs([(context, continuation) for _, context, continuation in requests])

    @abstractmethod
    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihood [nats], and True if the tokens are the likeliest."""


def rolling_windows(tokens: list[int], prefix: int, max_length: int) -> Iterator[Pair]:
    """Cut a text into contexts and continuations that score each of its tokens once.

    Args:
        tokens: Token ids of the text.
        prefix: Token id that serves as the context of the first token.
        max_length: Maximum number of tokens that the model reads.
    """
    windows = get_rolling_token_windows(
        token_list=tokens, prefix_token=prefix, max_seq_len=max_length, context_len=1
    )
    return map(make_disjoint_window, windows)


def generation_settings(arguments: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Complete the generation settings of a request: `do_sample`, `until` and `max_gen_toks`.

    Args:
        arguments: Arguments of a `generate_until` request.
        max_new_tokens: Default of `max_gen_toks`.
    """
    return dict(normalize_gen_kwargs(dict(arguments), max_new_tokens))


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the bar over the questions, which takes a second, inside the block."""
    shown = task_module.tqdm
    task_module.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        task_module.tqdm = shown


def index_tasks(folders: Sequence[Path], names: set[str]) -> TaskManager:
    """Index the tasks in `folders`; those of the harness too if `names` contains others.

    The 14,000 tasks of the harness take ten seconds to index.
    """
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if names <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=list(folders))


def task_config(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the content of the YAML file of a task."""
    return manager.task_index[name].cfg or {}


def load_task(
    manager: TaskManager, name: str, data_files: Mapping[str, Any] | None, reader: str | None = None
) -> Any:
    """Load a task with its data, in the form that `evaluate` accepts.

    Args:
        manager: Index that contains the task.
        name: Name of a task or of a group of tasks.
        data_files: Data files by split, which replace those in the file of the task; or None.
        reader: Kind of these files in `datasets`; None for a task whose data set are such files.
    """
    if not data_files:
        return manager.load([name])
    kwargs = {**task_config(manager, name).get("dataset_kwargs", {}), "data_files": data_files}
    changed: dict[str, Any] = {"task": name, "dataset_kwargs": kwargs}
    if reader is not None:
        changed |= {"dataset_path": reader, "dataset_name": None}
    loaded = manager.load([{"group": "with_files", "task": [changed]}])
    return {"tasks": loaded["tasks"]}  # without the group, which would get its own result


def set_fewshot(loaded: Any, shots: int | None) -> None:
    """Set the number of the few-shot examples of tasks.

    Args:
        loaded: Return value of `load_task`.
        shots: Number of examples; None keeps the number in the file of each task, or else 0.
    """
    for task in loaded["tasks"].values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)


def seed_fewshot(loaded: Any, seed: int) -> None:
    """Begin the choice of few-shot examples anew; each evaluation goes on where the last ended.

    Args:
        loaded: Return value of `load_task`.
        seed: Seed of the choice.
    """
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)


def metric_keys(loaded: Any, name: str) -> set[str] | None:
    """Return the keys that the metrics of a task or group have in results; None if unknown.

    Args:
        loaded: Return value of `load_task`.
        name: Name of the task or group. Empty without one of this name, as for a tag.
    """
    if name in loaded.get("groups", {}):
        return None if loaded["groups"][name].aggregate_metric_list else set()
    if name not in loaded["tasks"]:
        return set()
    task = loaded["tasks"][name]
    if not hasattr(task, "_filters") or callable(task.config.process_results):
        return None
    if any(callable(each["metric"]) for each in task.config.metric_list or []):
        return None  # its function names the metrics, such as pass@1
    return {f"{metric},{each.name}" for metric in task.aggregation() for each in task._filters}


def is_lower_better(loaded: Any, metric: str) -> bool:
    """Return True if a task says that lower values of a metric are the better ones.

    Args:
        loaded: Return value of `load_task`.
        metric: Key of the metric in results, such as `acc,none`.
    """
    name = metric.partition(",")[0]
    return any(task.higher_is_better().get(name) is False for task in loaded["tasks"].values())


def fewshot_of(loaded: Any) -> int:
    """Return the largest number of few-shot examples of the loaded tasks."""
    return max(task.get_config("num_fewshot") for task in loaded["tasks"].values())
