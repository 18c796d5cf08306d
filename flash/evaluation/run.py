"""Evaluation of a model or its program on a benchmark suite (`flash evaluate`)."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.arch import ArchSpec
from flash.device.program_limits import ProgramLimits
from flash.errors import InputError
from flash.evaluation.settings import EvaluateSettings, ModelFormat
from flash.evaluation.suites import Figure, SuiteResult, TaskResult, as_text, one_line
from flash.evaluation.tasks import Tasks, check_files, digest_of_included, digests_of_own
from flash.evaluation.tokenization import HarnessTokenizer
from flash.model.backbone import Backbone
from flash.model.checkpoint import load
from flash.outcome import note
from flash.paths import Runs
from flash.prune.importance import fingerprint
from flash.records import digest, file_digest, plain
from flash.tracking.artifacts import Artifact, ArtifactKind, weights_artifact
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.origin import find_origin
from flash.tracking.tracker import open_tracker
from flash.training.accelerators import check_devices, main_device
from flash.training.checkpoints import find_checkpoint
from flash.workspace import Workspace, result_name

if TYPE_CHECKING:
    from flash.evaluation.harness import TextLM

log = logging.getLogger(__name__)


FindProgram = Callable[[Runs, str, ArchSpec, Path], Path]
"""Function (runs, name, spec, weights) -> the program that was exported of the weights. It is
passed in, since the search asks tasks and the export reads what a search predicted."""


def _no_programs(runs: Runs, name: str, spec: ArchSpec, weights: Path) -> Path:
    raise InputError(f"format=program: expected the program of {weights}, found none")


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to evaluate.

    Attributes:
        settings: Settings of the evaluation.
        name: Name of the model.
        spec: Architecture.
        weights: Checkpoint folder, which may also hold the tokenizer.
        program: Path of the .pte with `format: program`, else None.
        context: Tokens that the model can read.
        tokenizer: Tokenizer of the model.
        workspace: Runs folder, backbone and device of the command.
    """

    settings: EvaluateSettings
    name: str
    spec: ArchSpec
    weights: Path
    program: Path | None
    context: int
    tokenizer: HarnessTokenizer
    workspace: Workspace

    @classmethod
    def open(cls, settings: EvaluateSettings, find_program: FindProgram) -> "EvaluatedModel":
        """Find and check all files without loading weights.

        Args:
            settings: Settings of the evaluation.
            find_program: Finds the program with `format: program`.

        Raises:
            InputError: Weights, tokenizer, program or chat template are missing or do not match.
        """
        runs, backbone = Runs(Path(settings.runs)), Backbone.open(settings.backbone)
        workspace = Workspace(runs=runs, backbone=backbone, device_settings=settings.device)
        name = result_name(settings)
        spec, weights = find_checkpoint(settings, name, backbone, runs)
        # Weights of random backbones come without a tokenizer.
        own = (weights / "tokenizer.json").is_file() or backbone.folder is None
        tokenizer = HarnessTokenizer.open(weights if own else backbone.folder or weights)
        tokenizer.tokenizer.require_fits(spec.vocab_size)
        if settings.suite.apply_chat_template:
            tokenizer = tokenizer.with_chat()
        program, context = None, spec.max_context
        if settings.format is ModelFormat.program:
            program = find_program(runs, name, spec, weights)
            context = context_of(program)
        else:
            check_devices(settings.trainer)
        return cls(settings, name, spec, weights, program, context, tokenizer, workspace)

    def key(self) -> dict[str, Any]:
        """Return all that determines the answers, apart from the questions."""
        settings = self.settings
        known: dict[str, Any] = {
            "form": settings.format.value,
            "tokenizer": self.tokenizer.tokenizer.digest,
            "ends": [self.tokenizer.prefix_id, *self.tokenizer.end_ids],
        }
        if self.program is None:
            return {
                **known,
                "weights": fingerprint(self.weights),
                "precision": settings.trainer.precision.value,
            }
        identity = self.workspace.device.identity()
        return {
            **known,
            "program": file_digest(self.program),
            "context": self.context,
            "device": [identity["cpu"], identity["runtime"]],
        }

    def open_model(self) -> "TextLM":
        """Load the model as an adapter for the harness."""
        from flash.evaluation.harness import DecoderLM, ProgramLM

        settings = self.settings
        if self.program is not None:
            device = self.workspace.device
            kinds = self.spec.layer_types
            return ProgramLM(device, self.program, self.tokenizer, kinds, self.context)
        model = load(self.weights).to(main_device(settings.trainer))
        precision = settings.trainer.precision
        return DecoderLM(model, self.tokenizer, batch_size=settings.batch_size, precision=precision)


def context_of(program: Path) -> int:
    """Return the context that a program was exported with [tokens].

    Raises:
        InputError: The file is damaged, or not one of `flash export`.
    """
    limits = ProgramLimits.find(program)
    if limits is None:
        raise InputError(
            f"format=program: {program} states no context, or is damaged; export it again"
        )
    return limits.context


def check(settings: EvaluateSettings, find_program: FindProgram = _no_programs) -> None:
    """Check what an evaluation needs, without loading weights or tasks.

    Raises:
        InputError: Settings, weights or data files cannot be used, or a stored result is damaged.
    """
    subject = _checked(settings, find_program)
    for task in settings.suite.chosen:
        TaskResult.read(_folder(settings, subject.name), task.name)


def _checked(settings: EvaluateSettings, find_program: FindProgram) -> EvaluatedModel:
    """Open the model, once its settings and the files of the tasks are checked."""
    check_files(settings.suite, settings.suite.chosen)
    return EvaluatedModel.open(settings, find_program)


def _folder(settings: EvaluateSettings, name: str) -> Path:
    """Return the folder of the task results."""
    runs = Runs(Path(settings.runs))
    return runs.evaluation(name) / f"{settings.suite.name}.{settings.format.value}"


def evaluate(settings: EvaluateSettings, find_program: FindProgram = _no_programs) -> SuiteResult:
    """Run a suite on a model; stored results of finished tasks are reused.

    Args:
        settings: Settings of the evaluation.
        find_program: Finds the program with `format: program`.

    Raises:
        InputError: Settings, weights, tasks or datasets cannot be used.
        DeviceError: The process of the program died.
    """
    subject = _checked(settings, find_program)
    folder = Runs(Path(settings.runs)).evaluation(subject.name)
    results, new = _results(settings, subject, _folder(settings, subject.name))
    figures = [Figure.of(task, results[task.name]) for task in settings.suite.chosen]
    shares = all(task.percent for task in settings.suite.chosen) and len(figures) > 1
    result = SuiteResult(
        name=subject.name,
        spec=subject.spec,
        suite=settings.suite.name,
        form=settings.format.value,
        limit=settings.limit,
        figures=figures,
        average=sum(row.value for row in figures) / len(figures) if shares else None,
    )
    result.write(folder)
    if new:
        _log(settings, subject, result)
    note(one_line(result), again=not new)
    print(f"\n{result.name}: {result.suite}, {result.form}")
    print(as_text(result))
    return result


def _results(
    settings: EvaluateSettings, subject: EvaluatedModel, folder: Path
) -> tuple[dict[str, TaskResult], bool]:
    """Return the result of each task by name, and True if any of them is new."""
    suite, limit = settings.suite, settings.limit
    common = {
        **subject.key(),
        "harness": version("lm_eval"),
        "include": digest_of_included(suite),
        "chat": subject.tokenizer.template if suite.apply_chat_template else None,
        "limit": limit,
        "seed": suite.seed,
    }
    keys = {
        task.name: digest([common, task.name, task.fewshot, *digests_of_own(task)])
        for task in suite.chosen
    }
    results: dict[str, TaskResult] = {}
    for name, key in keys.items():
        found = TaskResult.read(folder, name)
        if found is not None and found.key == key:
            results[name] = found
    missing = [task for task in suite.chosen if task.name not in results]
    if not missing:
        log.info("%s: %s is finished", subject.name, folder)
        return results, False
    tasks = Tasks.open(dataclasses.replace(suite, tasks=missing, leave_out=[]))
    # All tasks are loaded first, so missing data are reported before any work.
    loaded = {task.name: tasks.load(task) for task in missing}
    model = subject.open_model()
    for task in missing:
        log.info("%s: %s", subject.name, task.name)
        result = tasks.run(task.name, loaded.pop(task.name), model, limit, keys[task.name])
        result.write(folder)
        results[task.name] = result
    return results, True


def _log(settings: EvaluateSettings, subject: EvaluatedModel, result: SuiteResult) -> None:
    runs, backbone = subject.workspace.runs, subject.workspace.backbone
    info = RunInfo(
        job=JobType.evaluate,
        name=f"{result.name} {result.stem}",
        key=digest([subject.key(), settings.limit]),
        group=backbone.name,
        tags={"backbone": backbone.name, "suite": result.suite, "arch": result.name},
        config={**plain(settings), "spec": result.spec.to_dict()},
        origin=find_origin(runs, result.name, result.spec),
        folder=runs.evaluation(result.name) / result.stem,
    )
    metrics = {f"eval/{row.task}": row.value for row in result.figures}
    if result.average is not None:
        metrics["eval/average"] = result.average
    if subject.program is not None:
        source = Artifact(ArtifactKind.executorch, result.name, subject.program)
    else:
        source = weights_artifact(subject.weights, backbone.name, backbone.folder)
    with open_tracker(settings.logger, runs.logs, info) as tracker:
        tracker.use(source)
        tracker.log(metrics)
