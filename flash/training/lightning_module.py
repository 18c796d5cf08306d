"""The LightningModule for next-token cross-entropy, distillation from a teacher, or a mix."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from flash.compat.torch import scale_in_place
from flash.data.batch import Batch
from flash.data.teacher_cache import TeacherCache
from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.model.losses import LossSums, Operands, TopLogProbs, linear_losses
from flash.rounding.fake import fake_quantize, head_operands
from flash.training.distributed import full_tensor, shard
from flash.training.settings import OnSpike, RecipeSettings, TrainerSettings
from flash.training.stability import StepGuard, StepStatus, drop_gradients
from flash.training.teacher import Teacher


class LanguageModeling(L.LightningModule):
    """Trains a decoder on packed sequences.

    The gradient of a step is that of the mean loss over all tokens in the loss mask of its batch.
    It does not depend on the number of devices and micro-batches that share the batch.

    Args:
        model: The decoder to train.
        recipe: Loss weights, optimizer and schedule.
        trainer: Device, precision and treatment of faulty steps.
        steps: Optimizer steps that the schedule is stretched over.
        seq_len: Tokens per sequence, which set the scale of the learning rate.
        teacher: The unpruned backbone, or its stored outputs for the sequences of the run; required
            if `recipe.kd_weight` > 0.
        last: Checkpoint that `on_spike=rewind` goes back to.

    Attributes:
        guard: Check of each step before it is taken.
        step_loss: Mean loss of the last step over its whole batch [nats per token].

    Raises:
        InputError: Distillation without a teacher, or with one of another vocabulary.
    """

    def __init__(
        self,
        model: Decoder,
        recipe: RecipeSettings,
        trainer: TrainerSettings,
        *,
        steps: int,
        seq_len: int,
        teacher: Teacher | None = None,
        last: Path | None = None,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.trainer_settings = model, recipe, trainer
        self.steps, self.seq_len, self.last = steps, seq_len, last
        self.guard = StepGuard(trainer.spike_factor, trainer.max_skipped, recipe.lr)
        self.step_loss = float("nan")
        model.checkpoint_layers = trainer.activation_checkpointing
        if recipe.qat:
            fake_quantize(model, recipe.qat_format, rotate=recipe.qat_rotate)
        running = None
        if recipe.kd_weight > 0:
            running = _running_teacher(teacher, model, recipe)
        # Outside of the module tree, as neither belongs in a checkpoint.
        self._outside: dict[str, Any] = {"teacher": running}
        self._parts: list[tuple[Tensor, Tensor, int]] = []

    def configure_model(self) -> None:
        """Shard model and teacher if the strategy has a device mesh; compile the forward pass."""
        mesh = self.device_mesh
        for model in (self.model, self._outside["teacher"]):
            if mesh is not None and model is not None:
                shard(model, mesh["data_parallel"], self.trainer_settings.precision)
        hidden = self.model.hidden
        compiled = self.trainer_settings.compile
        self._outside["hidden"] = torch.compile(hidden) if compiled else hidden

    def losses(self, batch: Batch) -> tuple[LossSums, Tensor]:
        """Loss sums over the targets in the loss mask of a micro-batch, and their number."""
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].flatten()
        hidden = self._outside["hidden"](inputs, documents=batch.document_ids).flatten(0, 1)
        count = torch.tensor(len(targets), device=targets.device)
        learn: Any = slice(None)
        if batch.loss_mask is not None:
            learn = batch.loss_mask.flatten()
            hidden, targets, count = hidden[learn], targets[learn], learn.sum()
        sums = linear_losses(
            Operands(*head_operands(self.model, hidden)),
            targets,
            teacher=self._teacher_outputs(batch, learn),
            kd_weight=self.recipe.kd_weight,
            temperature=self.recipe.temperature,
        )
        return sums, count

    @torch.no_grad()
    def _teacher_outputs(self, batch: Batch, learn: Any) -> Operands | TopLogProbs | None:
        """The teacher's outputs for the targets in the loss mask; None without a teacher."""
        if batch.top_ids is not None and batch.top_log_probs is not None:
            ids, log_probs = batch.top_ids.flatten(0, 1), batch.top_log_probs.flatten(0, 1)
            return TopLogProbs(ids[learn], log_probs[learn])
        teacher: Decoder | None = self._outside["teacher"]
        if teacher is None:
            return None
        hidden = teacher.hidden(batch.tokens[:, :-1], documents=batch.document_ids).flatten(0, 1)
        return Operands(hidden[learn], teacher.lm_head.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        sums, count = self.losses(batch)
        positions = batch.tokens.shape[0] * (batch.tokens.shape[1] - 1)
        self._parts.append((torch.stack([part.detach() for part in sums]), count, positions))
        # A mean over all positions, as the number of targets in the loss mask of the whole batch is
        # not known yet. `on_before_optimizer_step` corrects the gradient.
        return sums.total / positions

    def _take_parts(self) -> tuple[Tensor, float]:
        """Mean losses `(total, ce, kd)` of the step's batch, and positions per target in the mask.

        Both are the same on all ranks. The micro-batches of the step are forgotten.
        """
        sums = torch.stack([part for part, _, _ in self._parts]).sum(0)
        counts = torch.stack([count for _, count, _ in self._parts]).sum().to(sums.dtype)
        positions = sum(positions for _, _, positions in self._parts) * self.trainer.world_size
        self._parts = []
        together = torch.cat([sums, counts[None]])
        if self.trainer.world_size > 1:
            together = self.trainer.strategy.reduce(together, reduce_op="sum")
        targets = max(float(together[3]), 1.0)
        return together[:3] / targets, positions / targets

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        means, scale = self._take_parts()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if scale != 1.0:
            scale_in_place([p.grad for p in parameters], scale)
        # Lightning refuses to clip gradients of fused optimizers under autocast, because a loss
        # scaler might interfere; bf16 and fp32 have none.
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.grad_clip))
        self.step_loss = float(means[0])
        status = self.guard.check(self.step_loss, float(norm))
        if status is not StepStatus.good:
            drop_gradients(list(self.model.parameters()))
            rewinds = self.trainer_settings.on_spike is OnSpike.rewind
            if status is StepStatus.spike and rewinds:
                self._rewind()
        names = ("loss", "ce", "kd") if self.recipe.kd_weight > 0 else ("loss", "ce")
        for name, value in zip(names, means, strict=False):
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        self.log("train/grad_norm", norm)
        self.log("train/lr", float(optimizer.param_groups[0]["lr"]))
        self._log_tokens(self.trainer.global_step + 1)
        self.log("train/skipped_steps", float(self.guard.skipped))

    def _log_tokens(self, steps: int) -> None:
        """Log the tokens seen in this number of steps, the x axis of losses."""
        tokens = steps * self.recipe.batch_size * self.seq_len
        # Lightning would round a number to float32, which has no odd ones above 2^24.
        self.log("train/tokens", torch.tensor(tokens, dtype=torch.float64))

    def _rewind(self) -> None:
        """Load weights and optimizer state of the last checkpoint; schedule and data go on."""
        if self.last is None or not self.last.is_file():
            return
        strategy = self.trainer.strategy
        checkpoint = strategy.load_checkpoint(self.last, weights_only=True)
        strategy.load_model_state_dict(checkpoint)
        strategy.load_optimizer_state_dict(checkpoint)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].flatten()
        hidden = self.model.hidden(inputs, documents=batch.document_ids).flatten(0, 1)
        if batch.loss_mask is not None:
            learn = batch.loss_mask.flatten()
            hidden, targets = hidden[learn], targets[learn]
        sums = linear_losses(Operands(*head_operands(self.model, hidden)), targets)
        loss = sums.ce / max(len(targets), 1)
        ranks = self.trainer.world_size > 1
        self.log("val/loss", loss, batch_size=max(len(targets), 1), sync_dist=ranks)

    def on_validation_epoch_end(self) -> None:
        self._log_tokens(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "guard" in checkpoint:  # checkpoints of older versions have none
            self.guard.load_state_dict(checkpoint["guard"])

    def on_fit_start(self) -> None:
        teacher: Decoder | None = self._outside["teacher"]
        if teacher is not None and self.device_mesh is None:
            teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.recipe.peak_lr(self.model.spec.model_dim, self.seq_len),
            betas=(self.recipe.beta1, self.recipe.beta2),
            fused=True,
        )
        schedule = LambdaLR(optimizer, lambda step: self.recipe.lr_factor(step, self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _running_teacher(
    teacher: Teacher | None, model: Decoder, recipe: RecipeSettings
) -> Decoder | None:
    """The teacher that runs along; None if the batches carry its stored outputs.

    Raises:
        InputError: There is no teacher, or its vocabulary is not the student's.
    """
    if isinstance(teacher, TeacherCache):
        return None
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
    return teacher.requires_grad_(False).eval()
