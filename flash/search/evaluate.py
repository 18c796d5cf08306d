"""Quality of one candidate: prune, a short continued pretraining, held-out loss (Sec. 3.5)."""

import time

import lightning as L

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.model import build
from flash.prune import Importance, prune
from flash.search.loop import EvaluationError, Quality
from flash.training import RecipeSettings, TrainerSettings, fit, heldout_quality
from flash.training.run import Inputs


class ShortTraining:
    """Evaluates candidates: every one sees the same tokens in the same order.

    Args:
        inputs: Backbone, text and where things are kept.
        importance: The backbone's scores.
        recipe: The short continued pretraining.
        trainer: What it runs on.
        seed: Of the training.
    """

    def __init__(
        self,
        inputs: Inputs,
        importance: Importance,
        recipe: RecipeSettings,
        trainer: TrainerSettings,
        seed: int,
    ) -> None:
        self.inputs, self.importance = inputs, importance
        self.recipe, self.trainer, self.seed = recipe, trainer, seed
        self._teacher = inputs.backbone.load() if recipe.kd_weight > 0 else None

    def __call__(self, spec: ArchSpec, number: int) -> Quality:
        """Held-out loss of `spec` after the recipe, and how it came about.

        Raises:
            EvaluationError: The training diverged or ran out of memory.
        """
        folder = self.inputs.backbone.folder
        assert folder is not None
        start = time.perf_counter()
        L.seed_everything(self.seed, verbose=False)
        model = build(spec, prune(folder, self.importance, spec), f"trial {number}")
        pruned_s = time.perf_counter() - start
        try:
            done = fit(
                model,
                self.inputs.data,
                self.recipe,
                self.trainer,
                teacher=self._teacher,
                show_progress=False,
            )
        except (InputError, MemoryError) as error:
            raise EvaluationError(str(error) or type(error).__name__) from error
        after = heldout_quality(model, self.inputs.data, self.trainer.precision)
        info = {
            "bits_per_byte": after.bits_per_byte,
            "tokens": done.tokens,
            "tokens_per_s": done.tokens_per_s,
            "prune_s": pruned_s,
            "importance": self.importance.digest,
            "seed": self.seed,
        }
        return Quality(after.loss, info)
