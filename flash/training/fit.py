"""Training of a decoder, with checkpoints to resume from, and its held-out loss."""

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

from flash.compat.lightning import kill_launched_processes
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
from flash.training.distributed import gather, lightning_precision, make_strategy
from flash.training.lightning_module import LanguageModeling
from flash.training.loss_curve import CurveRecorder, SaveAtStep, Watch
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings
from flash.training.stability import AtomicCheckpointIO, StopBySignal, Stopped
from flash.training.teacher import Teacher

LAST = "last.ckpt"
"""Name of the checkpoint that a stopped run resumes from."""
STABLE = "stable.ckpt"
"""Name of the checkpoint of the last step before the learning rate falls. A run for more tokens can
go on from it."""


_MAX_BATCH = 16
"""Most held-out sequences per forward pass."""


@dataclass(frozen=True)
class ValidationMetrics:
    """Quality on held-out text.

    Attributes:
        loss: Negative log-likelihood [nats per token].
        bits_per_byte: Negative log-likelihood in bits per UTF-8 byte of the target tokens, which
            can be compared between tokenizers.
        tokens: Number of target tokens.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def validate(model: Decoder, data: PackedData, precision: Precision) -> ValidationMetrics:
    """Quality of `model` on all held-out sequences of `data`.

    Args:
        model: Decoder on the device that it is to be evaluated on.
        data: Held-out sequences and the bytes of each token.
        precision: bf16 runs the matrix products in bf16.
    """
    total, tokens, num_bytes = 0.0, 0, 0
    device = next(model.parameters()).device
    batches = DataLoader(
        data.validation_set, batch_size=min(data.batch_size, _MAX_BATCH), collate_fn=collate
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
    """Length, speed and course of a training run.

    Attributes:
        steps: Optimizer steps in all, including those before the run was resumed.
        tokens: Tokens seen in these steps.
        tokens_per_s: Median rate of the last steps.
        mfu: Share of the machine's measured matrix-product rate.
        peak_rss_mib: Highest resident memory of the process [MiB].
        skipped_steps: Steps left out because their gradient was not finite or their loss a spike.
        curve: Mean training loss of each of up to 32 equal parts of the run [nats per token].
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
    label: str = "training",
    show_progress: bool = True,
) -> FitResult:
    """Train `model` in place; with `fsdp` only the main process ends up with the trained weights.

    Args:
        model: Trained in place; with a checkpoint in `folder`, its weights come from there.
        data: Batches, whose order follows from its batch size and seed.
        recipe: Optimizer, schedule and losses.
        trainer: Device, precision and intervals.
        teacher: Teacher for distillation; stored outputs must be those for the sequences of `data`.
        folder: Folder of the checkpoints, from which a stopped run resumes; None keeps none.
        start: Checkpoint of a shorter run to go on from when `folder` has none.
        keep_stable: True keeps the checkpoint `STABLE` in `folder` if the schedule is `wsd`.
        watch: Called with the loss curve as it grows; it may raise to end the run.
        loggers: Lightning loggers.
        label: Label of the progress bar.
        show_progress: False shows no progress bar.

    Raises:
        InputError: Distillation without a fitting teacher, a batch that cannot be split evenly, a
            damaged checkpoint, or a loss that is no longer finite.
        SystemExit: A signal has ended the run.
    """
    sharded = trainer.strategy is Strategy.fsdp
    trained = copy.deepcopy(model) if sharded else model
    last = folder / LAST if folder is not None else None
    module = _module(trained, data, recipe, trainer, teacher, last)
    shown = label if show_progress and is_main_process() else None
    data.teacher_cache = teacher if isinstance(teacher, TeacherCache) else None
    throughput = Throughput(trainer, shown, teacher.spec if isinstance(teacher, Decoder) else None)
    recorder = CurveRecorder(module.steps, watch)
    stable = recipe.stable_steps(module.seq_len) if keep_stable else 0
    callbacks = [throughput, recorder, *_checkpoint_callbacks(folder, trainer, stable)]
    lightning = _lightning(module, trainer, callbacks, folder, loggers)
    _run(lightning, module, data, last if last is not None and last.is_file() else start)
    if sharded:
        model.load_state_dict(gather(module.model), strict=lightning.is_global_zero)
    module.guard.check_end(lightning.global_step)
    return _result(lightning, module, throughput, recorder)


def _module(
    model: Decoder,
    data: PackedData,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    teacher: Teacher | None,
    last: Path | None,
) -> LanguageModeling:
    seq_len = data.settings.seq_len
    steps = recipe.steps(seq_len)
    return LanguageModeling(
        model, recipe, trainer, steps=steps, seq_len=seq_len, teacher=teacher, last=last
    )


def _checkpoint_callbacks(
    folder: Path | None, trainer: TrainerSettings, stable_steps: int
) -> list[L.Callback]:
    """The callbacks that write checkpoints into `folder`; None only stops the run on signals."""
    if folder is None:
        return [StopBySignal(None)]
    stable = [SaveAtStep(stable_steps, folder / STABLE)] if stable_steps else []
    regular = ModelCheckpoint(
        folder,
        filename="last",
        every_n_train_steps=trainer.checkpoint_every_steps,
        enable_version_counter=False,
        save_top_k=1,
    )
    return [*stable, StopBySignal(folder / LAST), regular]


def _result(
    lightning: L.Trainer,
    module: LanguageModeling,
    throughput: Throughput,
    recorder: CurveRecorder,
) -> FitResult:
    steps = lightning.global_step
    return FitResult(
        steps=steps,
        tokens=steps * module.recipe.batch_size * module.seq_len,
        tokens_per_s=throughput.tokens_per_s,
        mfu=throughput.mfu,
        peak_rss_mib=peak_rss_mib(),
        skipped_steps=module.guard.skipped,
        curve=recorder.curve.losses,
    )


def _lightning(
    module: LanguageModeling,
    trainer: TrainerSettings,
    callbacks: list[L.Callback],
    folder: Path | None,
    loggers: Any,
) -> L.Trainer:
    """Lightning's trainer for `module`; without a `folder` it writes no checkpoints."""
    max_steps = min(module.steps, trainer.max_steps or module.steps)
    accumulation = trainer.accumulation(module.recipe.batch_size)
    assert trainer.precision is not Precision.auto  # the settings have resolved it
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # flash.slurm queues jobs again
    # Validation during a run is worth its time only on runs long enough for several of them.
    evaluate = loggers is not False and max_steps > trainer.eval_every_steps
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.nodes,
        strategy=make_strategy(trainer),
        precision=lightning_precision(trainer),
        max_steps=max_steps,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,  # the data set shares out sequences among ranks itself
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
    lightning: L.Trainer, module: LanguageModeling, data: PackedData, last: Path | None
) -> None:
    """Train, from the checkpoint `last` if it is given.

    Raises:
        InputError: The checkpoint is damaged, or belongs to another architecture.
        KeyboardInterrupt: Ctrl-C has ended the run.
        SystemExit: A signal has ended the run.
    """
    with warnings.catch_warnings():
        # The process reads a memory map; workers would cost more time than they save.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")
        # A run that goes on from a shorter one has other checkpoint callbacks or another folder.
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
        warnings.filterwarnings("ignore", ".*The dirpath has changed.*")
        try:
            lightning.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        except OSError:
            kill_launched_processes(lightning)  # else they wait for this process and fail
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
                # Lightning takes any other code for a crash and kills the main process.
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
