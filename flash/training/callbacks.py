"""What a run shows while it goes."""

import logging
import time
from typing import Any

import lightning as L
import torch

from flash.arch import ArchSpec, training_flops_per_token
from flash.progress import progress_bar
from flash.training.lightning_module import LanguageModelling
from flash.training.settings import Precision, TrainerSettings

log = logging.getLogger(__name__)

ASSUMED_MFU = 0.4
"""Share of the matrix-product rate that training is taken to reach before it has been timed."""
_TIMED_STEPS = 20
_WORTH_SAYING_H = 1 / 12


def measure_peak_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a large matrix product on `device`: the peak that MFU is a share of.

    Measured, since a CPU has no datasheet figure that says what its cores reach here and now.
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
    """Progress with time left, tokens a second and MFU, in the bar and in the logger.

    Before the first step it says how long the run will take, and what it will cost: by counted work
    at `ASSUMED_MFU` of the device's matrix-product rate; after some steps by their time.

    Args:
        trainer: Devices, precision, price.
        what: Label of the bar; None shows no bar and says nothing.
        teacher: Architecture of the teacher, which is run as well.
    """

    def __init__(
        self, trainer: TrainerSettings, what: str | None, teacher: ArchSpec | None
    ) -> None:
        self.settings, self.what, self.teacher = trainer, what, teacher
        self.tokens_per_s = 0.0
        self.mfu = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModelling)
        self._peak = measure_peak_flops(pl_module.device, self.settings.precision)
        self._peak *= trainer.world_size
        recipe, seq_len = pl_module.recipe, pl_module.seq_len
        self._step_tokens = recipe.batch_size * seq_len
        self._flops = training_flops_per_token(pl_module.model.spec, seq_len)
        if self.teacher is not None:
            self._flops += training_flops_per_token(self.teacher, seq_len) / 3  # forward only
        shown = self.what is not None and trainer.is_global_zero
        total = int(trainer.max_steps)
        self._bar = progress_bar(self.what or "", total, unit="step", shown=shown)
        self._bar.initial = self._bar.n = trainer.global_step
        self._times: list[float] = []
        self._start = time.perf_counter()
        self._first = trainer.global_step
        if shown:
            self._say(
                trainer, self._flops * self._step_tokens / (ASSUMED_MFU * self._peak), "about"
            )

    def _say(self, trainer: L.Trainer, step_s: float, how: str) -> None:
        """The estimate, for runs of more than some minutes."""
        steps = int(trainer.max_steps) - trainer.global_step
        hours = steps * step_s / 3600
        if hours < _WORTH_SAYING_H:
            return
        cost = ""
        if self.settings.usd_per_hour is not None:
            cost = f", {hours * trainer.world_size * self.settings.usd_per_hour:,.0f} USD"
        tokens = steps * self._step_tokens
        log.info(
            "%s: %s tokens in %s steps on %d device(s): %s %.3g hours%s",
            self.what,
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
        assert isinstance(pl_module, LanguageModelling)
        if trainer.global_step == self._bar.n:
            return  # a micro-batch of a step that is not over
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
        if self.what is not None and trainer.global_step == self._first + _TIMED_STEPS:
            self._say(trainer, step_s, "by the first steps")
        pl_module.log("speed/tokens_per_s", self.tokens_per_s)
        pl_module.log("speed/mfu", self.mfu)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()  # not part of the next step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()
