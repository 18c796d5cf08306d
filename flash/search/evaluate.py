"""Evaluation of one candidate: prune, train briefly, measure the held-out loss (Sec. 3.5)."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flash.arch import ArchSpec
from flash.model.checkpoint import build
from flash.model.decoder import Decoder
from flash.prune.importance import Importance
from flash.prune.pruning import prune
from flash.records import digest
from flash.search.loop import EvaluationError
from flash.search.pruner import TrialPruned
from flash.search.quality import Quality, TaskError
from flash.search.tasks import SearchTasks, trained_tokenizer
from flash.training.accelerators import main_device
from flash.training.loss_curve import MAX_PARTS, Curve, Watch
from flash.training.memory import out_of_memory_named
from flash.training.result import LAST, STABLE, FitResult
from flash.training.settings import RecipeSettings, TrainerSettings
from flash.training.stability import Diverged
from flash.training.teacher import Teacher, teacher_of
from flash.training.validation import validate
from flash.workspace import Workspace


@dataclass(frozen=True)
class _Inputs:
    """Weights and text of the candidates with one vocabulary.

    Attributes:
        workspace: Backbone and text with this vocabulary.
        importance: Importance scores of this backbone.
        teacher: Teacher, or its stored outputs.
        per_token: Nats a token of the whole vocabulary for one nat a token of this one.
    """

    workspace: Workspace
    importance: Importance
    teacher: Teacher | None
    per_token: float


class ShortTraining:
    """Evaluator that prunes each candidate and trains it on the same tokens in the same order.

    Losses of candidates with fewer tokens than the backbone are given for a token of the backbone:
    they are proportional to bits per byte, and comparable.

    An interrupted trial resumes from its last checkpoint, which stays until `release`. With a
    recipe whose schedule is `wsd`, a complete trial leaves one from which it can be trained longer.

    Args:
        workspace: Backbone, training data and folders.
        importance: Importance scores of the backbone.
        recipe: Recipe of the short continued pretraining.
        trainer: Hardware and precision of the training.
        seed: Seed of the training.
        folder: Folder for checkpoints, with a subfolder for each candidate; None keeps none.
        shorter: Evaluator whose trials are continued here from their checkpoints; None starts
            from the pruned weights.
        vocab_sizes: Vocabularies whose inputs are made now; others are made when they are needed.
        tasks: Tasks to ask each candidate; None asks nothing.
    """

    def __init__(
        self,
        workspace: Workspace,
        importance: Importance,
        recipe: RecipeSettings,
        trainer: TrainerSettings,
        seed: int,
        folder: Path | None = None,
        shorter: "ShortTraining | None" = None,
        vocab_sizes: Sequence[int] | None = None,
        tasks: SearchTasks | None = None,
    ) -> None:
        self.workspace, self.importance = workspace, importance
        self.recipe, self.trainer, self.seed = recipe, trainer, seed
        self.folder, self.shorter, self.tasks = folder, shorter, tasks
        self._inputs: dict[int, _Inputs] = {}
        for size in vocab_sizes or [workspace.backbone.spec.vocab_size]:
            self._of(size)

    def _of(self, vocab_size: int) -> _Inputs:
        """Return the inputs of candidates with this vocabulary, and make them if they are new."""
        if vocab_size not in self._inputs:
            whole, cut = self.workspace, self.workspace.for_vocabulary(vocab_size)
            importance, per_token = self.importance, 1.0
            if cut is not whole:
                importance = cut.importance(self.recipe.calibration_tokens)
                per_token = whole.data.bytes_per_token / cut.data.bytes_per_token
            teacher = teacher_of(cut.backbone, cut.data, self.recipe, self.trainer, cut.runs)
            self._inputs[vocab_size] = _Inputs(cut, importance, teacher, per_token)
        return self._inputs[vocab_size]

    def checkpoints(self, spec: ArchSpec, number: int) -> Path | None:
        """Return the folder of a candidate's checkpoints; its name hashes all that affects them."""
        if self.folder is None:
            return None
        inputs = self._of(spec.vocab_size)
        trained = [self.recipe.decisive(), self.seed, inputs.workspace.data.train_identity]
        decisive = [spec.to_dict(), inputs.importance.digest, self.trainer.decisive(), trained]
        return self.folder / f"{number:05d}_{digest(decisive)}"

    def stable(self, spec: ArchSpec, number: int) -> Path | None:
        """Return the checkpoint from which a candidate can be trained longer, or None."""
        folder = self.checkpoints(spec, number)
        path = folder / STABLE if folder is not None else None
        return path if path is not None and path.is_file() else None

    def __call__(self, spec: ArchSpec, number: int, watch: Watch | None = None) -> Quality:
        """Train `spec` with the recipe and measure its held-out loss.

        Args:
            spec: Candidate architecture.
            number: Trial number, which is part of the name of the checkpoint folder.
            watch: Callback that receives the training loss so far.

        Raises:
            EvaluationError: The training diverged.
            InputError: There is too little memory, or a file that the training reads is damaged.
            TrialPruned: Raised by `watch` to end the trial early.
        """
        with out_of_memory_named(self.recipe, self.trainer):
            return self._evaluate(spec, number, watch)

    def release(self, spec: ArchSpec, number: int) -> None:
        """Remove the last checkpoint of a trial whose outcome is recorded."""
        folder = self.checkpoints(spec, number)
        if folder is not None:
            (folder / LAST).unlink(missing_ok=True)

    def _evaluate(self, spec: ArchSpec, number: int, watch: Watch | None) -> Quality:
        inputs = self._of(spec.vocab_size)
        backbone, importance = inputs.workspace.backbone.folder, inputs.importance
        assert backbone is not None
        start = time.perf_counter()
        from lightning import seed_everything  # takes seconds; a finished search has no use for it

        seed_everything(self.seed, verbose=False)
        model = build(spec, prune(backbone, importance, spec), f"trial {number}")
        about = {
            "importance": importance.digest,
            "seed": self.seed,
            "prune_s": time.perf_counter() - start,
        }
        try:
            done = self._fit(model, spec, number, watch, inputs)
        except TrialPruned as pruned:
            pruned.info |= about
            raise
        except Diverged as error:
            raise EvaluationError(str(error)) from error
        model.to(main_device(self.trainer))  # Lightning leaves it on the CPU
        after = validate(model, inputs.workspace.data, self.trainer.precision)
        errors: dict[str, TaskError] = {}
        if self.tasks is not None and math.isfinite(after.loss):
            errors = self.tasks.ask(model, trained_tokenizer(inputs.workspace))
        return Quality(
            after.loss * inputs.per_token,
            {
                **about,
                "bits_per_byte": after.bits_per_byte,
                "tokens": done.tokens,
                "tokens_per_s": done.tokens_per_s,
                "curve": self._points(done.curve, inputs),
            },
            errors,
        )

    def _fit(
        self, model: Decoder, spec: ArchSpec, number: int, watch: Watch | None, inputs: _Inputs
    ) -> FitResult:
        def watched(curve: Curve) -> None:
            losses = tuple(loss * inputs.per_token for loss in curve.losses)
            try:
                if watch is not None:
                    watch(Curve(losses, curve.parts))
            except TrialPruned as pruned:
                seen = self._points(curve.losses, inputs)
                pruned.info |= {"curve": seen, "tokens": int(seen[-1][0])}
                raise

        from flash.training.fit import fit

        return fit(
            model,
            inputs.workspace.data,
            self.recipe,
            self.trainer,
            teacher=inputs.teacher,
            folder=self.checkpoints(spec, number),
            start=self.shorter.stable(spec, number) if self.shorter is not None else None,
            keep_stable=self.shorter is None,
            watch=watched,
            show_progress=False,
        )

    def _points(self, losses: Sequence[float], inputs: _Inputs) -> list[list[float]]:
        """Pair each recorded training loss with the number of tokens seen by then."""
        losses = [loss * inputs.per_token for loss in losses]
        seq_len = self.workspace.data.settings.seq_len
        steps = self.recipe.steps(seq_len)
        tokens = steps * self.recipe.batch_size * seq_len
        return Curve(tuple(losses), min(steps, MAX_PARTS)).points(tokens)


def remove_checkpoints(evaluate: ShortTraining, beaten: set[int]) -> None:
    """Remove the checkpoints of dominated trials; each takes three times the size of its weights.

    Args:
        evaluate: Evaluator that owns the checkpoints.
        beaten: Numbers of finished trials that are off the frontier. A finished trial never returns
            to the frontier. Unfinished trials must not be listed: another worker may be training
            them.
    """
    if evaluate.folder is None or not evaluate.folder.is_dir():
        return
    for path in evaluate.folder.iterdir():
        number = path.name.partition("_")[0]
        if number.isdecimal() and int(number) in beaten:
            shutil.rmtree(path, ignore_errors=True)
