"""Quality of one candidate: prune, a short continued pretraining, held-out loss (Sec. 3.5)."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.model.checkpoint import build
from flash.model.decoder import Decoder
from flash.prune.importance import Importance
from flash.prune.pruning import prune
from flash.records import digest, plain
from flash.search.loop import EvaluationError, Quality
from flash.search.pruner import TrialPruned
from flash.training.fit import LAST, STABLE, FitResult, fit, validate
from flash.training.loss_curve import MOST_PARTS, Curve, Watch
from flash.training.settings import RecipeSettings, TrainerSettings
from flash.training.teacher import teacher_of
from flash.workspace import Workspace


class ShortTraining:
    """Evaluates candidates: every one sees the same tokens in the same order.

    A trial that was interrupted goes on from its last checkpoint. One that is complete leaves the
    checkpoint from which it can be trained longer, where the recipe has one (schedule `wsd`).

    Args:
        workspace: Backbone, text and where things are kept.
        importance: The backbone's scores.
        recipe: The short continued pretraining.
        trainer: What it runs on.
        seed: Of the training.
        folder: For checkpoints, a subfolder a candidate; None keeps none.
        shorter: The evaluation whose candidates are trained longer here: they go on from its
            checkpoints.
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
    ) -> None:
        self.workspace, self.importance = workspace, importance
        self.recipe, self.trainer, self.seed = recipe, trainer, seed
        self.folder, self.shorter = folder, shorter
        self._teacher = teacher_of(
            workspace.backbone, workspace.data, recipe, trainer, workspace.runs
        )

    def checkpoints(self, spec: ArchSpec, number: int) -> Path | None:
        """Folder of a candidate's checkpoints, by all that decides what is in them."""
        if self.folder is None:
            return None
        trained = [plain(self.recipe), self.seed, self.workspace.data.digest]
        decisive = [spec.to_dict(), self.importance.digest, self.trainer.precision.value, trained]
        return self.folder / f"{number:05d}_{digest(decisive)}"

    def stable(self, spec: ArchSpec, number: int) -> Path | None:
        """Checkpoint from which a candidate can be trained longer, if it is there."""
        folder = self.checkpoints(spec, number)
        path = folder / STABLE if folder is not None else None
        return path if path is not None and path.is_file() else None

    def __call__(self, spec: ArchSpec, number: int, watch: Watch | None = None) -> Quality:
        """Held-out loss of `spec` after the recipe, and how it came about.

        Raises:
            EvaluationError: The training diverged or ran out of memory.
            Hopeless: As `watch` raised it.
        """
        folder = self.checkpoints(spec, number)
        try:
            quality = self._evaluate(spec, number, watch)
        except (TrialPruned, EvaluationError):
            _remove(folder)
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _out_of_memory(error):
                raise
            _remove(folder)
            raise EvaluationError(str(error) or type(error).__name__) from error
        if folder is not None:
            (folder / LAST).unlink(missing_ok=True)
        return quality

    def _evaluate(self, spec: ArchSpec, number: int, watch: Watch | None) -> Quality:
        backbone = self.workspace.backbone.folder
        assert backbone is not None
        start = time.perf_counter()
        L.seed_everything(self.seed, verbose=False)
        model = build(spec, prune(backbone, self.importance, spec), f"trial {number}")
        about = {
            "importance": self.importance.digest,
            "seed": self.seed,
            "prune_s": time.perf_counter() - start,
        }
        try:
            done = self._fit(model, spec, number, watch)
        except TrialPruned as hopeless:
            hopeless.info |= about
            raise
        except InputError as error:
            raise EvaluationError(str(error)) from error
        after = validate(model, self.workspace.data, self.trainer.precision)
        return Quality(
            after.loss,
            {
                **about,
                "bits_per_byte": after.bits_per_byte,
                "tokens": done.tokens,
                "tokens_per_s": done.tokens_per_s,
                "curve": self._points(done.curve),
            },
        )

    def _fit(self, model: Decoder, spec: ArchSpec, number: int, watch: Watch | None) -> FitResult:
        def watched(curve: Curve) -> None:
            try:
                if watch is not None:
                    watch(curve)
            except TrialPruned as hopeless:
                seen = self._points(curve.losses)
                hopeless.info |= {"curve": seen, "tokens": int(seen[-1][0])}
                raise

        return fit(
            model,
            self.workspace.data,
            self.recipe,
            self.trainer,
            teacher=self._teacher,
            folder=self.checkpoints(spec, number),
            start=self.shorter.stable(spec, number) if self.shorter is not None else None,
            keep_stable=self.shorter is None,
            watch=watched,
            show_progress=False,
        )

    def _points(self, losses: Sequence[float]) -> list[list[float]]:
        """Tokens and training loss at the end of every part of the curve that is over."""
        seq_len = self.workspace.data.settings.seq_len
        steps = self.recipe.steps(seq_len)
        tokens = steps * self.recipe.batch_size * seq_len
        return Curve(tuple(losses), min(steps, MOST_PARTS)).points(tokens)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _out_of_memory(error: RuntimeError) -> bool:
    # A CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def tidy(evaluate: ShortTraining, beaten: set[int]) -> None:
    """Remove the checkpoints of these candidates, which take three times their weights.

    Only of finished ones that are off the frontier: those never come back to it, while one that
    another worker is training may have its checkpoint already.
    """
    if evaluate.folder is None or not evaluate.folder.is_dir():
        return
    for path in evaluate.folder.iterdir():
        if int(path.name.partition("_")[0]) in beaten:
            shutil.rmtree(path, ignore_errors=True)
