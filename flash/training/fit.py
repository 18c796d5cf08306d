"""One call that trains a decoder, resumes where it stopped, and reports the held-out loss."""

import copy
import math
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from flash.data.batch import collate
from flash.data.module import PackedData
from flash.data.teacher_cache import TeacherCache
from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.model.losses import Operands, linear_losses
from flash.model.quantization import head_operands
from flash.progress import progress
from flash.ranks import is_main_process
from flash.training.callbacks import Throughput
from flash.training.distributed import gather, lightning_precision, make_strategy, stop_others
from flash.training.lightning_module import LanguageModelling
from flash.training.loss_curve import CurveRecorder, SaveOnce, Watch
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings
from flash.training.stability import AtomicCheckpointIO, StopBySignal, Stopped
from flash.training.teacher import Teacher

LAST = "last.ckpt"
"""Where a stopped run goes on."""
STABLE = "stable.ckpt"
"""Where a run for more tokens can go on: just before the learning rate began to fall."""


_AT_ONCE = 16
"""Most held-out sequences at a time."""


@dataclass(frozen=True)
class ValidationMetrics:
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
def validate(model: Decoder, data: PackedData, precision: Precision) -> ValidationMetrics:
    """Held-out loss of `model`, on all of the data module's held-out sequences."""
    total, tokens, num_bytes = 0.0, 0, 0
    device = next(model.parameters()).device
    batches = DataLoader(
        data.validation_set, batch_size=min(data.batch_size, _AT_ONCE), collate_fn=collate
    )
    for batch in progress(batches, "held-out loss"):
        batch = move_data_to_device(batch, device)
        inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].flatten()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
            hidden = model.hidden(inputs, documents=batch.document_ids).flatten(0, 1)
            if batch.loss_mask is not None:
                learn = batch.loss_mask.flatten()
                hidden, targets = hidden[learn], targets[learn]
            student = Operands(*head_operands(model, hidden))
            total += float(linear_losses(student, targets).ce)
        tokens += targets.numel()
        num_bytes += int(data.bytes_per_token[targets.cpu().numpy()].sum())
    bits = total / math.log(2)
    return ValidationMetrics(total / tokens, bits / num_bytes, tokens)


@dataclass(frozen=True)
class FitResult:
    """How a training run went.

    Attributes:
        steps: Optimiser steps done in all, resumed ones included.
        tokens: Tokens seen in those steps.
        tokens_per_s: Median rate of the last steps.
        mfu: Share of the machine's measured matrix-product peak.
        peak_rss_mib: Highest resident memory of the process [MiB].
        skipped_steps: Steps left out since their gradient was not finite, or their loss a spike.
        curve: Mean training loss of each of up to 32 equal parts of the run [nats a token].
    """

    steps: int
    tokens: int
    tokens_per_s: float
    mfu: float
    peak_rss_mib: float
    skipped_steps: int = 0
    curve: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple(self.curve))  # lists come back from JSON


def fit(
    model: Decoder,
    data: PackedData,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    *,
    teacher: Teacher | None = None,
    folder: Path | None = None,
    start: Path | None = None,
    keep_stable: bool = False,
    watch: Watch | None = None,
    loggers: Any = False,
    what: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train `model` in place; with `fsdp` only the main process's has the trained weights after it.

    Args:
        model: Trained in place; with a checkpoint in `folder`, its weights come from there.
        data: Batches; its batch size and seed decide what is seen when.
        recipe: Optimiser, schedule and losses.
        trainer: Device, precision and intervals.
        teacher: For distillation; one that spoke ahead has read the same `data`.
        folder: Where checkpoints live; a run finds its own there and resumes. None keeps none.
        start: Checkpoint of a shorter run to go on from, when there is none in `folder`.
        keep_stable: Whether to leave such a checkpoint in `folder`, where the schedule has one.
        watch: Sees the training loss grow and may raise to end the run.
        loggers: Lightning loggers.
        what: Label of the progress bar.
        show_progress: Whether there is one.

    Raises:
        InputError: Distillation without a fitting teacher, a batch that cannot be shared out, a
            damaged checkpoint, or a loss that is no longer finite.
        SystemExit: A signal has ended the run.
    """
    seq_len = data.settings.seq_len
    steps = recipe.steps(seq_len)
    last = folder / LAST if folder is not None else None
    sharded = trainer.strategy is Strategy.fsdp
    module = LanguageModelling(
        copy.deepcopy(model) if sharded else model,
        recipe,
        trainer,
        steps=steps,
        seq_len=seq_len,
        teacher=teacher,
        last=last,
    )
    label = what if show_progress and is_main_process() else None
    data.teacher_cache = teacher if isinstance(teacher, TeacherCache) else None
    throughput = Throughput(trainer, label, teacher.spec if isinstance(teacher, Decoder) else None)
    recorder = CurveRecorder(steps, watch)
    callbacks: list[L.Callback] = [throughput, recorder, StopBySignal(last)]
    stable = recipe.stable_steps(seq_len)
    if folder is not None and keep_stable and stable:
        callbacks.insert(2, SaveOnce(stable, folder / STABLE))
    max_steps = min(steps, trainer.max_steps or steps)
    accumulation = trainer.accumulation(recipe.batch_size)
    lightning = _lightning(trainer, max_steps, accumulation, callbacks, folder, loggers)
    _run(lightning, module, data, last if last is not None and last.is_file() else start)
    if sharded:
        model.load_state_dict(gather(module.model), strict=lightning.is_global_zero)
    module.guard.check_end(lightning.global_step)
    return FitResult(
        steps=lightning.global_step,
        tokens=lightning.global_step * recipe.batch_size * seq_len,
        tokens_per_s=throughput.tokens_per_s,
        mfu=throughput.mfu,
        peak_rss_mib=peak_rss_mib(),
        skipped_steps=module.guard.skipped,
        curve=recorder.curve.losses,
    )


def _lightning(
    trainer: TrainerSettings,
    max_steps: int,
    accumulation: int,
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
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # flash.slurm does that
    # Held-out losses along the way are worth their time only on runs that have several of them.
    evaluate = loggers is not False and max_steps > trainer.eval_every_steps
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.nodes,
        strategy=make_strategy(trainer),
        precision=lightning_precision(trainer),
        max_steps=max_steps,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,  # the data know about ranks
        logger=loggers,
        callbacks=callbacks,
        plugins=plugins,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=trainer.log_every_steps,
        check_val_every_n_epoch=None,
        val_check_interval=trainer.eval_every_steps * accumulation if evaluate else None,
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
        except OSError:
            stop_others(lightning)  # they would wait for this one, and complain
            raise
        except (RuntimeError, EOFError, KeyError) as error:
            if last is not None and lightning.global_step == 0:
                raise InputError(
                    f"{last}: damaged or of another arch ({error}); delete it to start over"
                ) from error
            raise
        except Stopped as stopped:
            handler = signal.getsignal(stopped.number)
            if callable(handler):
                handler(stopped.number, None)
            if not lightning.is_global_zero:
                # Lightning takes another code for a crash, and kills the main process.
                raise SystemExit(0) from None
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
