"""lm-evaluation-harness: token scoring, text windows, generation settings, tasks as it keeps them.

Names that the harness 0.4.13 does not document, and the reasons to use them:

- `TemplateLM._loglikelihood_tokens`: the abstract method that a model with a tokenizer of its own
  implements.
- `lm_eval.models.utils.normalize_gen_kwargs`, `lm_eval.utils.get_rolling_token_windows` and
  `make_disjoint_window`: the rules of the harness's own `hf` model, so that results agree with it.
- `TaskManager.all_tasks` and `task_index`: which tasks there are, and what their YAML says.
- The dictionary that `TaskManager.load` takes and gives: an inline group may change what the file
  of a task says, and tasks are configured between loading and `evaluate`.

Import this module only where a benchmark is run: the harness takes a second to import.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Pair = tuple[list[int], list[int]]
"""Tokens of a context, and those of the continuation that is scored."""


class TokenScoringLM(TemplateLM):
    """A model of the harness whose `loglikelihood` ends in `score_pairs`."""

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self.score_pairs([(context, continuation) for _, context, continuation in requests])

    @abstractmethod
    def score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood [nats] of each continuation, and whether its tokens are the likeliest."""


def rolling_windows(tokens: list[int], prefix: int, max_length: int) -> Iterator[Pair]:
    """Cut a text into contexts and continuations that score each of its tokens once.

    Args:
        tokens: The text.
        prefix: Token that stands for the context of the first one.
        max_length: Tokens that the model can read.
    """
    windows = get_rolling_token_windows(
        token_list=tokens, prefix_token=prefix, max_seq_len=max_length, context_len=1
    )
    return map(make_disjoint_window, windows)


def generation_settings(asked: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """What a task asks of an answer, with defaults: `do_sample`, `until` and `max_gen_toks`.

    Args:
        asked: Arguments of a `generate_until` request.
        max_new_tokens: Default of `max_gen_toks`.
    """
    return dict(normalize_gen_kwargs(dict(asked), max_new_tokens))


def index_tasks(folders: Sequence[Path], names: set[str]) -> TaskManager:
    """The index of the tasks in `folders`, with the harness's own if `names` has others.

    The harness's own 14,000 tasks take ten seconds to index.
    """
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if names <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=list(folders))


def task_config(manager: TaskManager, name: str) -> dict[str, Any]:
    """What the YAML file of a task says."""
    return manager.task_index[name].cfg or {}


def load_task(manager: TaskManager, name: str, data_files: Mapping[str, Any] | None) -> Any:
    """A task with its data, as `evaluate` takes it.

    Args:
        manager: Knows the task.
        name: Of a task or of a group of tasks.
        data_files: Files to read, by split, in place of those that the task's file names.
    """
    if not data_files:
        return manager.load([name])
    kwargs = {**task_config(manager, name).get("dataset_kwargs", {}), "data_files": data_files}
    changed = {"task": name, "dataset_kwargs": kwargs}
    loaded = manager.load([{"group": "with_files", "task": [changed]}])
    return {"tasks": loaded["tasks"]}  # without the group, which would be a result of its own


def set_fewshot(loaded: Any, shots: int | None, seed: int) -> None:
    """Fix the examples that the tasks show.

    Args:
        loaded: What `load_task` gave.
        shots: Number of examples; None: what each task says, or none.
        seed: Of the choice of examples.
    """
    for task in loaded["tasks"].values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)


def fewshot_of(loaded: Any) -> int:
    """The most examples that one of the loaded tasks shows."""
    return max(task.get_config("num_fewshot") for task in loaded["tasks"].values())
