"""Tasks of lm-evaluation-harness as objectives: the error of each candidate after its training."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from flash.data.chat import taught
from flash.data.settings import DataKind
from flash.errors import InputError
from flash.evaluation.settings import SuiteSettings
from flash.evaluation.suites import Figure
from flash.evaluation.tasks import Tasks, check_files, digest_of_contents
from flash.evaluation.tokenization import HarnessTokenizer
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer
from flash.records import digest
from flash.search.objectives import Objective, Quantity
from flash.search.quality import TaskError
from flash.training.settings import Precision
from flash.workspace import Workspace


def named_tasks(suite: SuiteSettings, names: Sequence[str]) -> SuiteSettings:
    """Return the suite with these of its tasks alone.

    Raises:
        InputError: The folder of task files, or a data file, is missing.
    """
    chosen = [task for task in suite.chosen if task.name in names]
    check_files(suite, chosen)
    return dataclasses.replace(suite, tasks=chosen, leave_out=[])


def trained_tokenizer(workspace: Workspace) -> ModelTokenizer:
    """Return the tokenizer of candidates: with the chat template of the training, if it has one.

    Raises:
        InputError: There is none, or a training on conversations has no chat template.
    """
    data, tokenizer = workspace.data_settings, workspace.tokenizer
    assert data is not None
    return taught(tokenizer, data.chat_template) if data.kind is DataKind.chat else tokenizer


def _open(suite: SuiteSettings, tokenizer: ModelTokenizer) -> HarnessTokenizer:
    """Return the tokenizer by the rules of the harness, with chat ends if the suite asks so.

    Raises:
        InputError: There is no chat template.
    """
    found = HarnessTokenizer(tokenizer)
    return found.with_chat() if suite.apply_chat_template else found


@dataclass(frozen=True)
class SearchTasks:
    """Tasks of a suite, which are asked of every candidate.

    Attributes:
        suite: Suite with these tasks alone.
        questions: Number of questions of each; None: all.
        precision: Precision of matrix products.
    """

    suite: SuiteSettings
    questions: int | None
    precision: Precision

    @cached_property
    def found(self) -> Tasks:
        """The tasks, looked up once.

        Raises:
            InputError: The harness has no such task, or it may not run.
        """
        return Tasks.open(self.suite)

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """Each task with its data by name, loaded once.

        Raises:
            InputError: The data cannot be used, or the task has no such metric.
        """
        from flash.compat.lm_eval import is_lower_better, metric_keys

        found = {}
        for task in self.suite.tasks:
            loaded = found[task.name] = self.found.load(task)
            known = metric_keys(loaded, task.name)
            key = f"suite.tasks: metric of {task.name}={task.metric}"
            if known is not None and task.metric not in known:
                expected = f"one of {', '.join(sorted(known))}" if known else "a task that has one"
                raise InputError(f"{key}: expected {expected}")
            if is_lower_better(loaded, task.metric):
                raise InputError(f"{key}: expected a metric of which more is better")
        return found

    def identity(self, tokenizer: ModelTokenizer) -> dict[str, dict[str, Any]]:
        """Return what decides the answers by name of the task, for the fingerprint of a study.

        Args:
            tokenizer: Tokenizer of the backbone, whose chat template may be applied.
        """
        suite = self.suite
        chat = digest(_open(suite, tokenizer).template) if suite.apply_chat_template else None
        return {
            task.name: {
                "metric": task.metric,
                "fewshot": task.fewshot,
                "questions": self.questions,
                "files": digest_of_contents(suite, task),
                "suite.seed": suite.seed,
                "chat_template": chat,
                "lm_eval": version("lm_eval"),
            }
            for task in suite.tasks
        }

    def ask(self, model: Decoder, tokenizer: ModelTokenizer) -> dict[str, TaskError]:
        """Ask a model all tasks; return its errors by key of `Objective`.

        Args:
            model: Decoder on the device that it is to be evaluated on.
            tokenizer: Tokenizer of its vocabulary.

        Raises:
            InputError: A task asks for what the model cannot read, or its metric is no share.
        """
        from flash.evaluation.harness import DecoderLM

        subject = DecoderLM(
            model, _open(self.suite, tokenizer), precision=self.precision, show_progress=False
        )
        errors = {}
        for task in self.suite.tasks:
            loaded = self.loaded[task.name]
            result = self.found.run(task.name, loaded, subject, self.questions, key="")
            figure = Figure.of(task, result)
            if not 0 <= figure.value <= 100:
                raise InputError(
                    f"suite.tasks: metric of {task.name}={task.metric}: expected a share from 0 to "
                    f"1, is {figure.value / 100:g}"
                )
            key = Objective(Quantity.task, task=task.name).key
            errors[key] = TaskError(100 - figure.value, figure.stderr, figure.samples)
        return errors
