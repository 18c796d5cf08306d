"""The LightningModule: next-token cross-entropy, distillation from a teacher, or a mix."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flash.errors import InputError
from flash.model import Decoder, cross_entropy, distillation, over_chunks
from flash.training.settings import RecipeSettings


class LanguageModelling(L.LightningModule):
    """Trains a decoder on packed sequences `(b, s + 1)`.

    Args:
        model: The decoder to train.
        recipe: Loss weights, optimiser and schedule.
        steps: Optimiser steps that the schedule is stretched over.
        teacher: The unpruned backbone; required when `recipe.kd_weight` > 0.
        compiled: Whether to run the model through torch.compile.

    Raises:
        InputError: Distillation without a teacher, or with one of another vocabulary.
    """

    def __init__(
        self,
        model: Decoder,
        recipe: RecipeSettings,
        *,
        steps: int,
        teacher: Decoder | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.steps = model, recipe, steps
        if recipe.kd_weight > 0:
            if teacher is None:
                raise InputError(
                    f"recipe.kd_weight={recipe.kd_weight}: expected 0 without a teacher; choose a "
                    "backbone with weights or recipe=continue"
                )
            if teacher.spec.vocab_size != model.spec.vocab_size:
                raise InputError(
                    f"backbone vocabulary={teacher.spec.vocab_size}: expected the student's "
                    f"{model.spec.vocab_size}"
                )
            teacher.requires_grad_(False).eval()
        # Kept out of the module tree: neither belongs in a checkpoint.
        self._outside: dict[str, Any] = {
            "teacher": teacher if recipe.kd_weight > 0 else None,
            "hidden": torch.compile(model.hidden) if compiled else model.hidden,
        }

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch and its parts [nats a token]."""
        inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
        hidden = self._outside["hidden"](inputs).flatten(0, 1)
        vocab_size = self.model.spec.vocab_size
        teacher: Decoder | None = self._outside["teacher"]
        if teacher is None:
            ce = over_chunks(self._ce_sum, vocab_size, hidden, targets) / len(targets)
            return ce, {"ce": ce.detach()}
        with torch.no_grad():
            taught = teacher.to(inputs.device).hidden(inputs).flatten(0, 1)
        sums = over_chunks(self._ce_and_kd_sums, vocab_size, hidden, targets, taught)
        ce, kd = sums / len(targets)
        loss = self.recipe.kd_weight * kd + (1 - self.recipe.kd_weight) * ce
        return loss, {"ce": ce.detach(), "kd": kd.detach()}

    def _ce_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.model.lm_head(hidden)[None], targets[None]) * len(targets)

    def _ce_and_kd_sums(self, hidden: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        """Both sums as one tensor `(2,)`, so that they share the student's logits."""
        logits = self.model.lm_head(hidden)
        with torch.no_grad():
            teacher_logits = self._outside["teacher"].lm_head(taught)
        ce = cross_entropy(logits[None], targets[None])
        kd = distillation(logits[None], teacher_logits[None], self.recipe.temperature)
        return torch.stack([ce, kd]) * len(targets)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss, parts = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        for name, value in parts.items():
            self.log(f"train/{name}", value)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        hidden = self.model.hidden(batch[:, :-1]).flatten(0, 1)
        targets = batch[:, 1:].flatten()
        total = over_chunks(self._ce_sum, self.model.spec.vocab_size, hidden, targets)
        loss = total / len(targets)
        self.log("heldout/loss", loss, prog_bar=True, batch_size=len(batch))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning refuses to clip for fused optimisers under autocast, lest a loss scaler be in
        # the way; bf16 and fp32 have none.
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.recipe.lr,
            betas=(self.recipe.beta1, self.recipe.beta2),
            fused=True,
        )
        schedule = LambdaLR(optimizer, lambda step: self.recipe.lr_factor(step, self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
