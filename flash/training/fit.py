"""One call that trains a decoder, resumes where it stopped, and reports the held-out loss."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flash.data import PackedData
from flash.errors import InputError
from flash.model import Decoder, cross_entropy, over_chunks
from flash.progress import progress
from flash.training.callbacks import AtomicCheckpointIO, Throughput
from flash.training.curve import CurveRecorder, SaveOnce, Watch
from flash.training.module import LanguageModelling
from flash.training.settings import Precision, RecipeSettings, TrainerSettings

LAST = "last.ckpt"
"""Where a stopped run goes on."""
STABLE = "stable.ckpt"
"""Where a run for more tokens can go on: just before the learning rate began to fall."""


@dataclass(frozen=True)
class HeldOut:
    """Quality on held-out text.

    Attributes:
        loss: Negative log-likelihood [nats a token].
        bits_per_byte: The same in bits over the UTF-8 bytes of the target tokens, comparable
            between tokenizers.
        tokens: Target tokens that it was computed on.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def heldout_quality(model: Decoder, data: PackedData, precision: Precision) -> HeldOut:
    """Held-out loss of `model`, on all of the data module's held-out sequences."""
    total, tokens, num_bytes = 0.0, 0, 0
    device = next(model.parameters()).device

    def loss_sum(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model.lm_head(hidden)[None], targets[None]) * len(targets)

    for batch in progress(data.val_dataloader(), "held-out loss"):
        batch = batch.to(device)
        targets = batch[:, 1:].flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
            hidden = model.hidden(batch[:, :-1]).flatten(0, 1)
            total += float(over_chunks(loss_sum, model.spec.vocab_size, hidden, targets))
        tokens += targets.numel()
        num_bytes += int(data.streams.bytes_per_token[targets.cpu().numpy()].sum())
    bits = total / math.log(2)
    return HeldOut(total / tokens, bits / num_bytes, tokens)


@dataclass(frozen=True)
class FitResult:
    """How a training run went.

    Attributes:
        steps: Optimiser steps done in all, resumed ones included.
        tokens: Tokens seen in those steps.
        tokens_per_s: Median rate of the last steps.
        mfu: Share of the machine's measured matrix-product peak.
        peak_rss_mib: Highest resident memory of the process [MiB].
        curve: Mean training loss of each of up to 32 equal parts of the run [nats a token].
    """

    steps: int
    tokens: int
    tokens_per_s: float
    mfu: float
    peak_rss_mib: float
    curve: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple(self.curve))  # lists come back from JSON


def fit(
    model: Decoder,
    data: PackedData,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    *,
    teacher: Decoder | None = None,
    folder: Path | None = None,
    start: Path | None = None,
    keep_stable: bool = False,
    watch: Watch | None = None,
    loggers: Any = False,
    what: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train `model` in place.

    Args:
        model: Trained in place; with a checkpoint in `folder`, its weights come from there.
        data: Batches; its batch size and seed decide what is seen when.
        recipe: Optimiser, schedule and losses.
        trainer: Device, precision and intervals.
        teacher: For distillation.
        folder: Where checkpoints live; a run finds its own there and resumes. None keeps none.
        start: Checkpoint of a shorter run to go on from, when there is none in `folder`.
        keep_stable: Whether to leave such a checkpoint in `folder`, where the schedule has one.
        watch: Sees the training loss grow and may raise to end the run.
        loggers: Lightning loggers.
        what: Label of the progress bar.
        show_progress: Whether there is one.

    Raises:
        InputError: Distillation without a fitting teacher, a damaged checkpoint, or a loss that is
            no longer finite.
    """
    seq_len = data.settings.seq_len
    steps = recipe.steps(seq_len)
    module = LanguageModelling(
        model, recipe, steps=steps, teacher=teacher, compiled=trainer.compile
    )
    throughput = Throughput(trainer.precision, what if show_progress else None)
    max_steps = min(steps, trainer.max_steps or steps)
    recorder = CurveRecorder(steps, watch)
    callbacks: list[L.Callback] = [throughput, recorder]
    if folder is not None and keep_stable and recipe.stable_steps(seq_len):
        callbacks.append(SaveOnce(recipe.stable_steps(seq_len), folder / STABLE))
    lightning = _lightning(trainer, max_steps, callbacks, folder, loggers)
    last = folder / LAST if folder is not None and (folder / LAST).is_file() else start
    _run(lightning, module, data, last)
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise InputError(f"recipe.lr={recipe.lr}: training diverged; lower it")
    return FitResult(
        steps=lightning.global_step,
        tokens=lightning.global_step * recipe.batch_size * seq_len,
        tokens_per_s=throughput.tokens_per_s,
        mfu=throughput.mfu,
        peak_rss_mib=peak_rss_mib(),
        curve=recorder.curve.losses,
    )


def _lightning(
    trainer: TrainerSettings,
    max_steps: int,
    callbacks: list[L.Callback],
    folder: Path | None,
    loggers: Any,
) -> L.Trainer:
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(
                folder,
                filename="last",
                every_n_train_steps=trainer.checkpoint_every_steps,
                enable_version_counter=False,
                save_top_k=1,
            )
        )
    assert trainer.precision is not Precision.auto  # the settings have resolved it
    # Held-out losses along the way are worth their time only on runs that have several of them.
    evaluate = loggers is not False and max_steps > trainer.eval_every_steps
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        precision=trainer.precision.value,
        max_steps=max_steps,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=trainer.log_every_steps,
        check_val_every_n_epoch=None,
        val_check_interval=trainer.eval_every_steps if evaluate else None,
        limit_val_batches=1.0 if evaluate else 0,
        num_sanity_val_steps=0,
    )


def _run(
    lightning: L.Trainer, module: LanguageModelling, data: PackedData, last: Path | None
) -> None:
    """Train, from the checkpoint `last` if there is one."""
    with warnings.catch_warnings():
        # One process reads a memory map: workers would cost more than they save.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        # A run that goes on from a shorter one keeps checkpoints of its own, elsewhere or none.
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
        warnings.filterwarnings("ignore", ".*The dirpath has changed.*")
        try:
            lightning.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        except (RuntimeError, EOFError, KeyError) as error:
            if last is not None and lightning.global_step == 0:
                raise InputError(
                    f"{last}: damaged or of another arch ({error}); delete it to start over"
                ) from error
            raise
        except SystemExit:
            if lightning.interrupted:  # Lightning turns Ctrl-C into exit code 1
                raise KeyboardInterrupt from None
            raise


def peak_rss_mib() -> float:
    """Highest resident memory of this process so far [MiB]."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
