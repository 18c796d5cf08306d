"""Training of a decoder, with checkpoints to resume from."""

import copy
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from flash.compat.lightning import kill_launched_processes
from flash.data.corpus import PackedData
from flash.data.module import PackedDataModule
from flash.data.teacher_cache import TeacherCache
from flash.errors import InputError
from flash.model.decoder import Decoder
from flash.ranks import is_main_process
from flash.records import remove_leftovers
from flash.training.callbacks import CurveRecorder, SaveAtStep, Throughput
from flash.training.distributed import gather, lightning_precision, make_strategy
from flash.training.lightning_module import LanguageModeling
from flash.training.loss_curve import Watch
from flash.training.memory import is_out_of_memory, log_memory, out_of_memory_named, step_memory
from flash.training.result import LAST, STABLE, FitResult
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings
from flash.training.stability import AtomicCheckpointIO, StopBySignal, Stopped
from flash.training.teacher import Teacher


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
            damaged checkpoint, a device without free memory, or a loss that is no longer finite.
        SystemExit: A signal has ended the run.
    """
    sharded = trainer.strategy is Strategy.fsdp
    trained = copy.deepcopy(model) if sharded else model
    last = folder / LAST if folder is not None else None
    if folder is not None and is_main_process():
        remove_leftovers(folder)
    module = _module(trained, data, recipe, trainer, teacher, last)
    shown = label if show_progress and is_main_process() else None
    data.teacher_cache = teacher if isinstance(teacher, TeacherCache) else None
    running = teacher.spec if isinstance(teacher, Decoder) else None
    throughput = Throughput(trainer, shown, running)
    recorder = CurveRecorder(module.steps, watch)
    stable = recipe.stable_steps(module.seq_len) if keep_stable else 0
    callbacks = [throughput, recorder, *_checkpoint_callbacks(folder, trainer, stable)]
    lightning = _lightning(module, trainer, callbacks, folder, loggers)
    need = step_memory(model.spec, recipe, trainer, module.seq_len, running)
    if shown is not None:
        log_memory(label, need, recipe, trainer)
    with out_of_memory_named(recipe, trainer, need):
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
            lightning.fit(
                module, datamodule=PackedDataModule(data), ckpt_path=last, weights_only=True
            )
        except OSError:
            kill_launched_processes(lightning)  # else they wait for this process and fail
            raise
        except (RuntimeError, EOFError, KeyError) as error:
            unread = last is not None and lightning.global_step == 0
            if unread and not is_out_of_memory(error):
                raise InputError(
                    f"{last}: damaged or of another arch ({error}); delete it to start over"
                ) from error
            raise
        except Stopped as stopped:
            if lightning.strategy.launcher is not None and not lightning.is_global_zero:
                # Lightning takes any other code for a crash and kills the main process.
                raise SystemExit(0) from None
            handler = signal.getsignal(stopped.number)
            if callable(handler):
                handler(stopped.number, None)
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
