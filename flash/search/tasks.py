"""Tasks of lm-evaluation-harness as objectives: the error of each candidate after its training."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flash.errors import InputError
from flash.evaluation.settings import SuiteSettings
from flash.evaluation.suites import Figure
from flash.evaluation.tasks import Tasks, check_files, digest_of_included, digests_of_own
from flash.evaluation.tokenization import HarnessTokenizer
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer
from flash.records import digest
from flash.search.objectives import Objective, Quantity
from flash.search.quality import TaskError
from flash.training.settings import Precision

_log = logging.getLogger(__name__)


def named_tasks(suite: SuiteSettings, names: Sequence[str]) -> SuiteSettings:
    """Return the suite with these of its tasks alone.

    Raises:
        InputError: The folder of task files, or a data file, is missing.
    """
    chosen = [task for task in suite.chosen if task.name in names]
    check_files(suite, chosen)
    return dataclasses.replace(suite, tasks=chosen, leave_out=[])


def identity_of(
    suite: SuiteSettings, questions: int | None, tokenizer: ModelTokenizer
) -> dict[str, str]:
    """Return a hash of the questions, by name of the task, for the fingerprint of a study.

    Args:
        suite: Suite with the tasks.
        questions: Number of questions of each; None: all.
        tokenizer: Tokenizer of the backbone, whose chat template may be applied.
    """
    common = [
        version("lm_eval"),
        digest_of_included(suite),
        _open(suite, tokenizer).template if suite.apply_chat_template else None,
        questions,
        suite.seed,
    ]
    return {
        task.name: digest([common, task.name, task.metric, task.fewshot, *digests_of_own(task)])
        for task in suite.tasks
    }


def _open(suite: SuiteSettings, tokenizer: ModelTokenizer) -> HarnessTokenizer:
    """Return the tokenizer by the rules of the harness, with chat ends if the suite asks so.

    Raises:
        InputError: There is no chat template.
    """
    found = HarnessTokenizer(tokenizer)
    return found.with_chat() if suite.apply_chat_template else found


@dataclass(frozen=True)
class SearchTasks:
    """Tasks with their data, loaded once and asked of every candidate.

    Attributes:
        tasks: Tasks of the suite.
        loaded: Each task with its data, by name.
        questions: Number of questions of each; None: all.
        precision: Precision of matrix products.
    """

    tasks: Tasks
    loaded: dict[str, Any]
    questions: int | None
    precision: Precision

    @classmethod
    def open(
        cls, suite: SuiteSettings, questions: int | None, precision: Precision
    ) -> "SearchTasks":
        """Look up and load the tasks.

        Raises:
            InputError: A task, or its data, cannot be used.
        """
        from flash.compat.lm_eval import is_lower_better

        tasks = Tasks.open(suite)
        loaded = {task.name: tasks.load(task) for task in suite.tasks}
        for task in suite.tasks:
            if is_lower_better(loaded[task.name], task.metric):
                raise InputError(
                    f"search.objectives: task {task.name}: metric={task.metric}: expected a share "
                    "of right answers, of which more are better"
                )
        return cls(tasks, loaded, questions, precision)

    def ask(self, model: Decoder, tokenizer: ModelTokenizer) -> dict[str, TaskError]:
        """Ask a model all tasks; return its errors by key of `Objective`.

        Args:
            model: Decoder on the device that it is to be evaluated on.
            tokenizer: Tokenizer of its vocabulary.

        Raises:
            InputError: A task has no such metric, or asks for what the model cannot read.
        """
        from flash.evaluation.harness import DecoderLM

        suite = self.tasks.suite
        subject = DecoderLM(model, _open(suite, tokenizer), precision=self.precision)
        errors = {}
        for task in suite.tasks:
            result = self.tasks.run(
                task.name, self.loaded[task.name], subject, self.questions, key=""
            )
            if task.metric not in result.metrics:
                known = ", ".join(key for key in result.metrics if "_stderr" not in key)
                raise InputError(
                    f"search.objectives: task {task.name}: metric={task.metric}: expected one of "
                    f"{known}"
                )
            figure = Figure.of(task, result)
            key = Objective(Quantity.task, task=task.name).key
            errors[key] = TaskError(100 - figure.value, figure.stderr, figure.samples)
            _log.debug("task %s: %d questions, %.1f s", task.name, result.samples, result.seconds)
        return errors
