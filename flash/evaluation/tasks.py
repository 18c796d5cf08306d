"""Tasks of lm-evaluation-harness: lookup, validation, loading and running.

The harness is imported inside functions, since importing it takes a second.
"""

import hashlib
import logging
import math
import os
import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash.data.readers import UNREADABLE, check_objects
from flash.errors import InputError, nearest, require
from flash.evaluation.sandbox import check_sandbox
from flash.evaluation.settings import SuiteSettings, TaskSettings
from flash.evaluation.suites import TaskResult
from flash.records import file_digest

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).parent / "harness_tasks"
"""Folder with tasks of the paper that the harness lacks."""
SANDBOXED_TASKS = Path(__file__).parent / "sandboxed_tasks"
"""Folder with tasks of the harness whose code runs in our sandbox."""
_READERS = {
    **{f".{kind}": kind for kind in ("arrow", "csv", "json", "parquet")},
    ".jsonl": "json",
    ".txt": "text",
}
"""Kind of a file in `datasets`, by its suffix; a data set of such a name needs no hub."""
BOOTSTRAP = 1000
"""Bootstrap resamples for standard errors of metrics other than means; 100000 take minutes."""


def check_files(suite: SuiteSettings, tasks: Sequence[TaskSettings]) -> None:
    """Check that the files of tasks are there.

    Raises:
        InputError: The folder of task files is missing, or a pattern of data files matches none.
    """
    if suite.include is not None:
        require(Path(suite.include).is_dir(), "suite.include", suite.include, "a folder")
    for task in tasks:
        data_files(task)


def digest_of_included(suite: SuiteSettings) -> str | None:
    """Hash the task files of `suite.include`; None if there is no such folder."""
    return _digest_of(_task_files(Path(suite.include))) if suite.include else None


def digests_of_own(task: TaskSettings) -> list[str]:
    """Hash the data files of a task with `files`, and the task files of this package."""
    sandboxed = (SANDBOXED_TASKS / f"{task.name}.yaml").is_file()
    if not task.files and not sandboxed:
        return []
    own = SANDBOXED_TASKS if sandboxed else OWN_TASKS
    return [_digest_of(_data_of(task)), _digest_of(_task_files(own))]


def digest_of_contents(suite: SuiteSettings, task: TaskSettings) -> str:
    """Hash the contents of task files, of the data beside them, and of `files`, wherever they are.

    Data elsewhere, such as a data set of a hub, are known by their names only.
    """
    hasher = hashlib.sha256()
    folders = [OWN_TASKS, SANDBOXED_TASKS, *([Path(suite.include)] if suite.include else [])]
    for folder in folders:
        for path in _task_files(folder, {*_TASK_FILES, *_READERS, ".gz"}):
            hasher.update(f"{path.relative_to(folder)} {file_digest(path)}\n".encode())
    for path in _data_of(task):
        hasher.update(f"{file_digest(path)}\n".encode())
    return hasher.hexdigest()[:16]


def _data_of(task: TaskSettings) -> list[Path]:
    return [Path(path) for paths in data_files(task).values() for path in paths]


_TASK_FILES = frozenset({".yaml", ".py", ".jsonl", ".json"})


def _task_files(folder: Path, kinds: Collection[str] = _TASK_FILES) -> list[Path]:
    """Find the task files in a folder, and the data beside them, but not a cache of `datasets`."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in kinds and path.is_file()]
    caches = {path.parent for path in found if path.name == "dataset_info.json"}
    return [path for path in found if path.parent not in caches]


def _digest_of(paths: list[Path]) -> str:
    """Hash the paths and contents of files."""
    hasher = hashlib.sha256()
    for path in paths:
        hasher.update(f"{path} {file_digest(path)}\n".encode())
    return hasher.hexdigest()[:16]


def data_files(task: TaskSettings) -> dict[str, list[str]]:
    """Find the data files of each split that the settings of a task name.

    Raises:
        InputError: A pattern matches no file.
    """
    found = {}
    for split, pattern in task.files.items():
        found[split] = sorted(glob(pattern, recursive=True))
        if not found[split]:
            raise InputError(
                f"suite.tasks: files of {task.name}: {split}={pattern}: no such file; download the "
                f"data from its authors, or leave the task out: suite.leave_out=[{task.name}]"
            )
    return found


def _reader_of(task: TaskSettings, files: dict[str, list[str]]) -> str:
    """Kind of the files that take the place of a data set of the hub.

    Raises:
        InputError: Their suffix tells none.
    """
    first = next(iter(files.values()))[0]
    known = [_READERS[suffix] for suffix in Path(first).suffixes if suffix in _READERS]
    if not known:
        raise InputError(
            f"suite.tasks: files of {task.name}: {first}: expected a file that ends in "
            f"{', '.join(_READERS)}, or one of these and .gz"
        )
    return known[-1]


def _check_json(files: Any) -> None:
    """Check the rows of JSON files, because pyarrow kills the process at a row that is null.

    Args:
        files: Paths as `datasets` takes them: one, a list, or either of these by split.

    Raises:
        InputError: A row is no object.
    """
    match files:
        case dict():
            _check_json(list(files.values()))
        case list():
            for each in files:
                _check_json(each)
        case str() if {".json", ".jsonl"} & set(Path(files).suffixes) and Path(files).is_file():
            check_objects(Path(files))


@dataclass(frozen=True)
class Tasks:
    """Tasks of a suite, found in the harness but not loaded.

    Attributes:
        suite: Settings of the suite.
        manager: Task index of the harness.
    """

    suite: SuiteSettings
    manager: "TaskManager"

    @classmethod
    def open(cls, suite: SuiteSettings) -> "Tasks":
        """Look up the tasks and check that they may run.

        Raises:
            InputError: The harness has no such task, a task executes code without permission, or
                its data files are missing.
        """
        from flash.compat.lm_eval import index_tasks

        # Its warnings, such as "overwriting num_fewshot", report what the settings ask for.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        names = [task.name for task in suite.tasks]
        folders = [OWN_TASKS, SANDBOXED_TASKS, *([Path(suite.include)] if suite.include else [])]
        manager = index_tasks(folders, set(names))
        tasks = cls(suite, manager)
        for task in suite.tasks:
            name = task.name
            data_files(task)
            if name not in manager.all_tasks:
                hint = nearest(name, manager.all_tasks)
                own = "" if suite.include else "; tasks of your own need suite.include=FOLDER"
                raise InputError(f"suite.tasks: {name}: no such task of the harness; {hint}{own}")
            about = tasks._about(name)
            if about.get("metadata", {}).get("sandbox"):
                check_sandbox()
            if about.get("unsafe_code") and not suite.allow_code_execution:
                raise InputError(
                    f"suite.tasks: {name}: executes code that the model writes, on this machine "
                    "and without a sandbox; do that in a container or virtual machine, with "
                    f"suite.allow_code_execution=true, or leave it out: suite.leave_out=[{name}]"
                )
        return tasks

    def _about(self, name: str) -> dict[str, Any]:
        """Return the content of the task's YAML."""
        from flash.compat.lm_eval import task_config

        return task_config(self.manager, name)

    def load(self, task: TaskSettings) -> Any:
        """Load a task, or a group of tasks, with its data.

        Returns:
            The task in the format of the harness, for `run`.

        Raises:
            InputError: The dataset cannot be loaded.
        """
        from datasets.exceptions import DatasetsError

        from flash.compat.huggingface_hub import is_reachable
        from flash.compat.lm_eval import load_task, set_fewshot

        own_files, about = data_files(task), self._about(task.name)
        dataset = about.get("dataset_path", "of its subtasks")
        is_files = dataset in _READERS.values()
        reachable = bool(own_files) or is_files or is_reachable()
        reader = None if is_files or not own_files else _reader_of(task, own_files)
        if self.suite.allow_code_execution:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # required by the metrics of such tasks
        try:
            _check_json([own_files, about.get("dataset_kwargs", {}).get("data_files")])
            loaded = load_task(self.manager, task.name, own_files, reader)
        except InputError as error:
            raise InputError(f"suite.tasks: files of {task.name}: {error}; mend it") from error
        except (*UNREADABLE, DatasetsError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not reachable:
                reason = "it is not in the cache, and the hub cannot be reached"
            raise InputError(
                f"suite.tasks: {task.name}: dataset {dataset} cannot be loaded ({reason}); it is "
                "downloaded once, so run this with a network first, or copy the cache (HF_HOME) "
                "of a machine that has it"
            ) from error
        set_fewshot(loaded, task.fewshot)
        return loaded

    def run(self, name: str, loaded: Any, model: "LM", limit: int | None, key: str) -> TaskResult:
        """Evaluate the model on a loaded task.

        Args:
            name: Name of the task.
            loaded: Task returned by `load`.
            model: Model to evaluate.
            limit: Greatest number of questions; None asks all.
            key: Key to store with the result.
        """
        from lm_eval.evaluator import evaluate

        from flash.compat.lm_eval import fewshot_of, no_bars, seed_fewshot

        seed_fewshot(loaded, self.suite.seed)
        random.seed(self.suite.seed)
        np.random.seed(self.suite.seed)
        started = time.perf_counter()
        with no_bars():
            found: Any = evaluate(
                lm=model,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=self.suite.apply_chat_template,
                fewshot_as_multiturn=self.suite.apply_chat_template,
                confirm_run_unsafe_code=self.suite.allow_code_execution,
            )
        values = {**found["results"], **found.get("groups", {})}[name]
        return TaskResult(
            name=name,
            shots=fewshot_of(loaded),
            samples=sum(counts["effective"] for counts in found["n-samples"].values()),
            metrics={
                metric: float(value)
                for metric, value in values.items()
                if "," in metric and isinstance(value, int | float) and math.isfinite(value)
            },
            seconds=time.perf_counter() - started,
            key=key,
        )
