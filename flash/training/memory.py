"""Memory of a training step: an estimate by counting, and what to change when it runs out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flash.arch import ArchSpec, count_parameters
from flash.errors import InputError
from flash.model.losses import CHUNK_LOGITS
from flash.training.accelerators import local_device, uses_cuda
from flash.training.settings import Precision, RecipeSettings, Strategy, TrainerSettings

log = logging.getLogger(__name__)

GIB = 2**30
_STATE_BYTES = 16
"""Bytes of a float32 weight, its gradient and AdamW's two averages."""


@dataclass(frozen=True)
class StepMemory:
    """Memory that one device needs for a training step [bytes].

    Attributes:
        states: Weights, gradients and optimizer states.
        activations: Tensors that the forward pass keeps for the backward pass.
        losses: Largest tensors of the losses, which are computed in chunks.
        teacher: Weights of a teacher that runs along.
    """

    states: int
    activations: int
    losses: int
    teacher: int

    @property
    def total(self) -> int:
        """The sum, which is a little above the peak, as not all exist at the same time."""
        return self.states + self.activations + self.losses + self.teacher

    def __str__(self) -> str:
        teacher = f", {self.teacher / GIB:.1f} for the teacher" if self.teacher else ""
        return (
            f"about {self.total / GIB:.1f} GiB: {self.states / GIB:.1f} for weights, gradients and "
            f"optimizer states, {self.activations / GIB:.1f} for activations, "
            f"{self.losses / GIB:.1f} for losses{teacher}"
        )


def activation_bytes_per_token(
    spec: ArchSpec, precision: Precision, *, checkpointing: bool = False
) -> int:
    """Bytes that the forward pass of a decoder keeps per token for the backward pass.

    The tensors are those that autograd saves, by the shapes of the decoder: for each matrix product
    its input, for SwiGLU its two factors and the output of SiLU, for attention queries, keys,
    values and output, and for each norm three tensors as wide as its input. With `checkpointing`
    only the input of each layer is kept, and the insides of one layer at a time.
    """
    size = 2 if precision is Precision.bf16 else 4
    norm = 3 * 4 + (1 if precision is Precision.bf16 else 0)
    q_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = norm * spec.model_dim + 2 * size * (q_dim + kv_dim) + 4 * spec.num_heads
    if spec.qk_norm:
        attention += 8 * (q_dim + kv_dim)
    layers = [
        norm * spec.model_dim + 4 * size * ffn_dim + (attention if kind.attends else 0)
        for kind, ffn_dim in zip(spec.layer_types, spec.ffn_dims, strict=True)
    ]
    rest = 10 * spec.model_dim
    if checkpointing:
        return 4 * spec.model_dim * len(layers) + max(layers) + rest
    return sum(layers) + rest


def step_memory(
    spec: ArchSpec,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    seq_len: int,
    teacher: ArchSpec | None = None,
) -> StepMemory:
    """Estimate the memory of one device for a training step.

    Args:
        spec: Architecture of the trained model.
        recipe: Batch and losses.
        trainer: Devices, precision, micro-batch and checkpointing.
        seq_len: Tokens per sequence.
        teacher: Architecture of a teacher that runs along; None without one.
    """
    ranks = trainer.devices * trainer.nodes
    shards = ranks if trainer.strategy is Strategy.fsdp else 1
    size = 2 if trainer.precision is Precision.bf16 else 4
    per_token = activation_bytes_per_token(
        spec, trainer.precision, checkpointing=trainer.activation_checkpointing
    )
    tokens = trainer.sequences_at_once(recipe.batch_size) * seq_len
    logits = min(CHUNK_LOGITS, tokens * spec.vocab_size)
    return StepMemory(
        states=_STATE_BYTES * count_parameters(spec).total // shards,
        activations=tokens * per_token,
        losses=logits * (size + 8) * (2 if recipe.kd_weight > 0 else 1),
        teacher=size * count_parameters(teacher).total // shards if teacher is not None else 0,
    )


def remedy(recipe: RecipeSettings, trainer: TrainerSettings) -> str:
    """The setting that halves the memory of a step, or what is left to do if none does."""
    at_once = trainer.sequences_at_once(recipe.batch_size)
    if at_once > 1:
        # A divisor of the batch keeps the batch, and so the result, as it is.
        smaller = next(n for n in range(at_once // 2, 0, -1) if recipe.batch_size % n == 0)
        return (
            f"trainer.micro_batch={smaller} at least halves the activations, with the same result"
        )
    if not trainer.activation_checkpointing:
        return (
            "trainer.activation_checkpointing=true keeps only the inputs of layers, with the same "
            "result"
        )
    return "a smaller data.seq_len, or trainer=fsdp on more devices, is what is left"


def is_out_of_memory(error: BaseException) -> bool:
    """True if Python, or PyTorch on a GPU or a CPU, found no free memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)  # for CPUs there is no class of its own


@contextmanager
def out_of_memory_named(
    recipe: RecipeSettings, trainer: TrainerSettings, need: StepMemory | None = None
) -> Iterator[None]:
    """Raise `InputError` with `remedy` in place of the error of a device without free memory.

    Args:
        recipe: Batch and losses.
        trainer: Devices, precision, micro-batch and checkpointing.
        need: The estimate, to be named beside the memory of the device.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        at_once = trainer.sequences_at_once(recipe.batch_size)
        device = "GPU" if uses_cuda(trainer) else "CPU"
        total = device_memory(trainer)
        room = f" of {total / GIB:.1f} GiB" if total else ""
        estimate = f" (needed: {need})" if need is not None else ""
        raise InputError(
            f"trainer.micro_batch={at_once}: the {device}{room} has run out of memory{estimate}; "
            f"{remedy(recipe, trainer)}"
        ) from error


def log_memory(
    label: str, need: StepMemory, recipe: RecipeSettings, trainer: TrainerSettings
) -> None:
    """Log the estimate beside what the GPU has, with the remedy if it has less; nothing on CPUs."""
    room = device_memory(trainer)
    if room is None:
        return
    log.info("%s: memory of a step, %s; the GPU has %.1f GiB", label, need, room / GIB)
    if need.total > room:
        log.warning("%s: expected to run out of memory; %s", label, remedy(recipe, trainer))


def device_memory(trainer: TrainerSettings) -> int | None:
    """Memory of the GPU that `trainer` uses [bytes]; None for other devices."""
    if not uses_cuda(trainer) or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(local_device(trainer)).total_memory
