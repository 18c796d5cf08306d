"""Progress, throughput and expected cost of a training run."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from flash.arch import ArchSpec, training_flops_per_token
from flash.progress import progress_bar
from flash.training.lightning_module import LanguageModeling
from flash.training.loss_curve import MAX_PARTS, Curve, Watch
from flash.training.settings import Precision, TrainerSettings

log = logging.getLogger(__name__)

ASSUMED_MFU = 0.4
"""Share of the matrix-product rate (MFU) that is assumed before the first steps are timed."""
_TIMED_STEPS = 20
"""Steps after which the estimate is made again from their times."""
_MIN_ESTIMATE_H = 1 / 12
"""Duration below which no estimate is logged [hours]."""


def measure_peak_flops(device: torch.device, precision: Precision) -> float:
    """Rate of a large matrix product on `device` [FLOP/s], the best of six tries.

    MFU is the share of this rate that training reaches. It is measured because no data sheet gives
    the rate that a CPU reaches under its present load and clock.
    """
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Throughput(L.Callback):
    """Shows and logs progress, tokens per second and MFU (share of the peak FLOP/s).

    Before the first step it logs how long the run will take and what it will cost, from the FLOPs
    of the run and `ASSUMED_MFU`. After `_TIMED_STEPS` steps it logs both again, from their times.

    Args:
        trainer: Devices, precision and price.
        label: Label of the progress bar; None shows no bar and logs no estimate.
        teacher: Architecture of a teacher that runs along; None without one.

    Attributes:
        tokens_per_s: Rate of the last steps, by the median of their times.
        mfu: Share of the measured matrix-product rate at that speed.
    """

    def __init__(
        self, trainer: TrainerSettings, label: str | None, teacher: ArchSpec | None
    ) -> None:
        self.trainer_settings, self.label, self.teacher = trainer, label, teacher
        self.tokens_per_s = 0.0
        self.mfu = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModeling)
        self._peak = measure_peak_flops(pl_module.device, self.trainer_settings.precision)
        self._peak *= trainer.world_size
        recipe, seq_len = pl_module.recipe, pl_module.seq_len
        self._step_tokens = recipe.batch_size * seq_len
        self._flops = training_flops_per_token(pl_module.model.spec, seq_len)
        if self.teacher is not None:
            self._flops += training_flops_per_token(self.teacher, seq_len) / 3  # forward only
        shown = self.label is not None and trainer.is_global_zero
        total = int(trainer.max_steps)
        self._bar = progress_bar(self.label or "", total, unit="step", shown=shown)
        self._bar.initial = self._bar.n = trainer.global_step
        self._times: list[float] = []
        self._start = time.perf_counter()
        self._first = trainer.global_step
        if shown and self._first:
            log.info("%s: goes on after step %d of %d", self.label, self._first, total)
        if shown:
            self._log_estimate(
                trainer, self._flops * self._step_tokens / (ASSUMED_MFU * self._peak), "about"
            )

    def _log_estimate(self, trainer: L.Trainer, step_s: float, how: str) -> None:
        """Log time and cost of the remaining steps, if they take more than some minutes."""
        steps = int(trainer.max_steps) - trainer.global_step
        hours = steps * step_s / 3600
        if hours < _MIN_ESTIMATE_H:
            return
        cost = ""
        if self.trainer_settings.usd_per_hour is not None:
            cost = f", {hours * trainer.world_size * self.trainer_settings.usd_per_hour:,.0f} USD"
        tokens = steps * self._step_tokens
        log.info(
            "%s: %s tokens in %s steps on %d device(s): %s %.3g hours%s",
            self.label,
            f"{tokens:,}",
            f"{steps:,}",
            trainer.world_size,
            how,
            hours,
            cost,
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModeling)
        if trainer.global_step == self._bar.n:
            return  # more micro-batches of this step follow
        now = time.perf_counter()
        self._times = [*self._times[-19:], now - self._start]
        self._start = now
        step_s = sorted(self._times)[len(self._times) // 2]
        self.tokens_per_s = self._step_tokens / step_s
        self.mfu = self.tokens_per_s * self._flops / self._peak
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss {pl_module.step_loss:.3f}, {self.tokens_per_s:,.0f} tok/s, {self.mfu:.0%} MFU",
            refresh=False,
        )
        if self.label is not None and trainer.global_step == self._first + _TIMED_STEPS:
            self._log_estimate(trainer, step_s, "by the first steps")
        pl_module.log("speed/tokens_per_s", self.tokens_per_s)
        pl_module.log("speed/mfu", self.mfu)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()  # validation is not part of the next step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


class CurveRecorder(L.Callback):
    """Records the loss of every step, including those before the run was resumed.

    Args:
        steps: Optimizer steps of the whole run.
        watch: Called with the curve after each of its parts; None calls nothing.
    """

    def __init__(self, steps: int, watch: Watch | None) -> None:
        self.steps, self.watch = steps, watch
        self._losses: list[float] = []

    @property
    def curve(self) -> Curve:
        """The curve of the steps so far."""
        return Curve.of(self._losses, self.steps)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModeling)
        step = trainer.global_step
        if step == len(self._losses):
            return  # more micro-batches of this step follow
        self._losses.append(pl_module.step_loss)
        parts = min(self.steps, MAX_PARTS)
        ends = {round(i * self.steps / parts) for i in range(1, parts + 1)}
        if self.watch is not None and step in ends:
            self.watch(self.curve)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = list(state_dict["losses"])


class SaveAtStep(L.Callback):
    """Writes one checkpoint, with which another run can go on under another schedule.

    Args:
        step: Number of finished steps at which it is written.
        path: File of the checkpoint.
    """

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)  # includes the optimizer
