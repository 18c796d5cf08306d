"""What a run shows while it goes, and how it saves itself."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from flash.arch import training_flops_per_token
from flash.files import atomic_write
from flash.progress import progress_bar
from flash.training.module import LanguageModelling
from flash.training.settings import Precision


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

    Args:
        precision: Arithmetic whose matrix-product rate is taken for the peak.
        what: Label of the bar; None shows no bar.
    """

    def __init__(self, precision: Precision, what: str | None) -> None:
        self.precision, self.what = precision, what
        self.tokens_per_s = 0.0
        self.mfu = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._peak = measure_peak_flops(pl_module.device, self.precision) * trainer.world_size
        shown = self.what is not None
        self._bar = progress_bar(self.what or "", int(trainer.max_steps), unit="step", shown=shown)
        self._bar.initial = self._bar.n = trainer.global_step
        self._times: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModelling)
        self._times = [*self._times[-19:], time.perf_counter() - self._start]
        sequences, seq_len = batch.shape[0], batch.shape[1] - 1
        median = sorted(self._times)[len(self._times) // 2]
        self.tokens_per_s = sequences * seq_len * trainer.world_size / median
        flops = training_flops_per_token(pl_module.model.spec, seq_len)
        self.mfu = self.tokens_per_s * flops / self._peak
        self._bar.update()
        loss = trainer.callback_metrics.get("train/loss")
        self._bar.set_postfix_str(
            f"loss {float(loss or 0):.3f}, {self.tokens_per_s:,.0f} tok/s, {self.mfu:.0%} MFU",
            refresh=False,
        )
        pl_module.log("speed/tokens_per_s", self.tokens_per_s)
        pl_module.log("speed/mfu", self.mfu)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, but a kill or a full disk keeps the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)
