"""Settings of training: the recipe (what is learned, how) and the trainer (on what)."""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from flash.arch import GROUP
from flash.data.settings import DataSettings
from flash.errors import InputError, check_name, check_seed, require
from flash.model.settings import BackboneSettings
from flash.records import plain
from flash.rounding.settings import TrainedRounding, WeightFormat
from flash.tracking.settings import LoggerSettings


class Schedule(Enum):
    """Learning rate after warm-up."""

    cosine = "cosine"
    """Cosine from the peak to the final rate."""
    wsd = "wsd"
    """Warm-up, stable, then a linear decay over the last part."""


class Precision(Enum):
    """Arithmetic of forward and backward; weights and optimiser states stay float32."""

    fp32 = "32-true"
    """float32 throughout."""
    bf16 = "bf16-mixed"
    """bfloat16 autocast."""
    auto = "auto"
    """bf16 where the processor multiplies it faster, else fp32: emulated, bf16 is five times slower
    than fp32 (seen on AVX2), and with AVX-512 BF16 but without AMX twice (seen on a Xeon)."""


def native_precision(accelerator: str) -> Precision:
    """The precision that `Precision.auto` stands for on this machine."""
    if accelerator == "auto":
        import torch  # only here: settings, and so the errors of a command, do without it

        accelerator = "gpu" if torch.accelerator.is_available() else "cpu"
    faster = accelerator != "cpu" or any(words <= _cpu_words() for words in _FAST_BF16)
    return Precision.bf16 if faster else Precision.fp32


_FAST_BF16 = ({"amx_bf16"}, {"avx512_bf16", "AuthenticAMD"}, {"bf16"})
"""Words by which the kernel describes processors with fast products in bf16; the last is Arm's."""


def _cpu_words() -> set[str]:
    """Words of the description of the processor by Linux; empty on other systems."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text("utf-8").split()) if path.is_file() else set()


@dataclass(kw_only=True)
class LrReference:
    """Width and batch that a learning rate was found at.

    Elsewhere it is multiplied by `model_dim / width`, as Adam's updates of matrices want it
    (arXiv:2203.03466, muP, there for hidden matrices; here for all, as embeddings are tied), and by
    the square root of `batch / batch_tokens` (arXiv:2205.10287).
    """

    model_dim: int | None = None
    """Width of the model; null: the rate does not depend on it."""
    batch_tokens: int | None = None
    """Tokens a step; null: the rate does not depend on them."""

    def __post_init__(self) -> None:
        for name in ("model_dim", "batch_tokens"):
            value = getattr(self, name)
            expected = "a positive integer or null"
            require(value is None or value > 0, name, value, expected)


@dataclass(kw_only=True)
class RecipeSettings:
    """Config group `recipe`. The paper states none of these values for Flash."""

    name: str
    """Name of the recipe, for people."""
    tokens: int
    """Training tokens; the number of steps follows from it."""
    inherit: bool = True
    """Begin with the backbone's weights, or those of `start`; false begins with random ones,
    without a teacher, and the backbone gives the shape and the tokenizer alone."""
    batch_size: int = 8
    """Sequences a step, over all devices; `trainer.micro_batch` decides how many at a time."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises, but at least two steps; 0 has none."""
    decay_ratio: float = 0.25
    """Share of the steps over which `wsd` decays."""
    schedule: Schedule = Schedule.cosine
    """Learning rate after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    kd_weight: float = 0.0
    """Weight of the distillation loss; cross-entropy gets the rest. 0 needs no teacher."""
    temperature: float = 1.0
    """Softens teacher and student in the distillation loss."""
    kd_top_k: int | None = None
    """Likeliest tokens of the teacher that are computed once, ahead, and kept for all students of
    the same text; null: the teacher runs along, and counts with all its tokens."""
    kd_top_p: float | None = None
    """Probability at which the teacher's likeliest tokens for a position are enough, so that fewer
    than `kd_top_k` are kept of it; null: `kd_top_k` of each."""
    calibration_tokens: int = 65536
    """Training tokens that the importance scores are averaged over."""
    qat: bool = False
    """Train with the rounding of 8da4w in the forward pass, as it will be on the device."""
    qat_group_size: int = GROUP
    """Weights that share a scale, as `device.lowering.group_size`."""
    qat_embedding_bits: int = 4
    """Bits of a weight of the embedding, as `device.lowering.embedding_bits`."""
    qat_rotate: bool = True
    """Turn the weights before they are rounded, as `device.lowering.rotate`."""
    qat_calibration_tokens: int = 8192
    """Training tokens for `gptq`, from whose weights `qat` begins; 0 begins with the weights as
    they are."""
    lr_reference: LrReference = dataclasses.field(default_factory=LrReference)
    """Width and batch that `lr` was found at, to scale it to others; by default `lr` is taken as it
    is."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for name in ("tokens", "batch_size", "calibration_tokens"):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive integer")
        for name in ("lr", "grad_clip", "temperature"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, value, "a positive number")
        for name in ("final_lr_ratio", "warmup_ratio", "decay_ratio", "kd_weight"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a number from 0 to 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "a number from 0 to below 1")
        k = self.kd_top_k
        require(k is None or k > 0, "kd_top_k", k, "a positive integer or null")
        if k is not None and self.kd_weight == 0:
            raise InputError(
                f"kd_top_k={k}: expected null with kd_weight=0, which asks for no teacher; set "
                "kd_weight, or choose recipe=distill"
            )
        if not self.inherit and self.kd_weight > 0:
            raise InputError(
                f"kd_weight={self.kd_weight}: expected 0 with inherit=false, which has no teacher"
            )
        p = self.kd_top_p
        require(p is None or 0 < p < 1, "kd_top_p", p, "a number between 0 and 1, or null")
        if p is not None:
            expected = f"a positive integer, the most tokens of a position, with kd_top_p={p}"
            require(k is not None, "kd_top_k", "null", expected)
        size, bits = self.qat_group_size, self.qat_embedding_bits
        require(size > 0 and size % GROUP == 0, "qat_group_size", size, f"a multiple of {GROUP}")
        require(bits in (4, 8), "qat_embedding_bits", bits, "4 or 8")
        tokens = self.qat_calibration_tokens
        require(tokens >= 0, "qat_calibration_tokens", tokens, "0 or more")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")

    @property
    def qat_format(self) -> WeightFormat:
        """Integers that `qat` trains for."""
        return WeightFormat(self.qat_group_size, self.qat_embedding_bits)

    @property
    def trained_rounding(self) -> TrainedRounding | None:
        """Rounding that the weights are trained for; None without `qat`."""
        if not self.qat:
            return None
        return TrainedRounding(
            group_size=self.qat_group_size,
            embedding_bits=self.qat_embedding_bits,
            rotate=self.qat_rotate,
        )

    def decisive(self) -> dict[str, Any]:
        """Plain values of the fields that decide the weights of the result.

        `inherit` is not among them, as keys of results name the first weights instead. Without
        `qat` neither are those that came after results without them.
        """
        left_out = {"inherit"} if self.qat else {"inherit", "qat_rotate", "qat_calibration_tokens"}
        return {key: value for key, value in plain(self).items() if key not in left_out}

    def peak_lr(self, model_dim: int, seq_len: int) -> float:
        """Highest learning rate for a model of this width."""
        rate, found = self.lr, self.lr_reference
        if found.model_dim is not None:
            rate *= found.model_dim / model_dim
        if found.batch_tokens is not None:
            rate *= math.sqrt(self.batch_size * seq_len / found.batch_tokens)
        return rate

    def steps(self, seq_len: int) -> int:
        """Optimiser steps for `tokens` tokens."""
        return max(1, math.ceil(self.tokens / (self.batch_size * seq_len)))

    def warmup_steps(self, steps: int) -> int:
        """Steps over which the learning rate rises, of `steps` in all.

        At least two, as one would already have the peak rate, if half of a short run allows it.
        """
        if self.warmup_ratio == 0:
            return 0
        return max(round(self.warmup_ratio * steps), min(2, steps // 2))

    def stable_steps(self, seq_len: int) -> int:
        """Steps before the learning rate falls, at which a run can go on for more tokens; or 0."""
        if self.schedule is not Schedule.wsd:
            return 0
        steps = self.steps(seq_len)
        warmup = self.warmup_steps(steps)
        return steps - min(steps - warmup, round(self.decay_ratio * steps))

    def longer(self, tokens: int, seq_len: int) -> "RecipeSettings":
        """The same recipe for more tokens; with `wsd` its first `stable_steps` are the same."""
        warmup = self.warmup_steps(self.steps(seq_len))
        recipe = dataclasses.replace(self, tokens=tokens)
        return dataclasses.replace(recipe, warmup_ratio=warmup / recipe.steps(seq_len))

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate at a 0-based step as a share of the peak."""
        warmup = self.warmup_steps(steps)
        if step < warmup:
            return (step + 1) / warmup
        decay = steps - warmup
        if self.schedule is Schedule.wsd:
            decay = min(decay, round(self.decay_ratio * steps))
        left = min(1.0, (steps - step) / max(decay, 1))
        if self.schedule is Schedule.cosine:
            left = 0.5 * (1 - math.cos(math.pi * left))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * left


class Strategy(Enum):
    """Ways to share the work among devices."""

    auto = "auto"
    """One device, or `ddp`."""
    ddp = "ddp"
    """Each has the whole model and a part of the batch."""
    fsdp = "fsdp"
    """Weights, gradients and optimiser states are shared out too (FSDP2)."""


TRAINER_UNCOUNTED = frozenset({
    # Ways to compute the same.
    *("accelerator", "devices", "nodes", "strategy", "micro_batch"),
    *("activation_checkpointing", "compile"),
    # What is written along the way, and what ends a run: it goes on with another value.
    *("eval_every_steps", "checkpoint_every_steps", "log_every_steps"),
    *("max_skipped", "usd_per_hour"),
})
"""Fields of `TrainerSettings` that do not decide the result of a training."""


class OnSpike(Enum):
    """Reactions to a step whose loss stands out."""

    skip = "skip"
    """Leave the step out."""
    rewind = "rewind"
    """Go back to the last checkpoint's weights and optimiser, on with the data that come next."""


@dataclass(kw_only=True)
class TrainerSettings:
    """Config group `trainer`: Lightning's part."""

    accelerator: str = "cpu"
    """Lightning accelerator: cpu, gpu, auto, ..."""
    devices: int = 1
    """Devices on each node; more than one start a process each."""
    nodes: int = 1
    """Machines; Slurm or torchrun start the command on each."""
    strategy: Strategy = Strategy.auto
    """Way to share the work among devices."""
    micro_batch: int | None = None
    """Sequences at a time on one device, for memory; null: its whole share of the batch. Gradients
    are added up over the rest, so the result is the same."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its insides."""
    precision: Precision = Precision.auto
    """`auto` becomes what it stands for at once; machines that share a study should name one."""
    compile: bool = False
    """torch.compile; pays on runs of more than some minutes and needs a C++ compiler on CPU."""
    max_steps: int | None = None
    """Stop after this many steps although the recipe has more."""
    eval_every_steps: int = 200
    """Steps between held-out losses."""
    checkpoint_every_steps: int = 50
    """Steps between checkpoints that a killed run resumes from."""
    log_every_steps: int = 10
    """Steps between logged training losses."""
    spike_factor: float | None = None
    """A loss this many quartile distances above the median of the last 64 steps is a spike; null
    looks for none. Steps whose gradients are not finite are always left out."""
    on_spike: OnSpike = OnSpike.skip
    """Reaction to a spike of the loss."""
    max_skipped: int = 10
    """Steps left out in a row that end the run."""
    usd_per_hour: float | None = None
    """Price of one device, for the estimate that a run begins with."""

    def __post_init__(self) -> None:
        counts = ("devices", "nodes", "eval_every_steps", "checkpoint_every_steps")
        for name in (*counts, "log_every_steps", "max_skipped"):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive integer")
        for name in ("max_steps", "micro_batch"):
            value = getattr(self, name)
            expected = "a positive integer or null"
            require(value is None or value > 0, name, value, expected)
        for name in ("spike_factor", "usd_per_hour"):
            value = getattr(self, name)
            expected = "a positive number or null"
            require(value is None or value > 0, name, value, expected)
        known = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
        require(
            self.accelerator in known,
            "accelerator",
            self.accelerator,
            f"one of {', '.join(known)}",
        )
        if self.strategy is Strategy.auto and self.devices * self.nodes > 1:
            self.strategy = Strategy.ddp
        if self.precision is Precision.auto:
            self.precision = native_precision(self.accelerator)

    def sequences_at_once(self, batch_size: int) -> int:
        """Sequences that one device holds at a time, for this many over all devices."""
        return self.micro_batch or max(1, batch_size // (self.devices * self.nodes))

    def decisive(self) -> dict[str, Any]:
        """Plain values of all fields that decide a result, but `TRAINER_UNCOUNTED`."""
        return {k: v for k, v in plain(self).items() if k not in TRAINER_UNCOUNTED}

    def accumulation(self, batch_size: int) -> int:
        """Micro-batches a step, for this many sequences over all devices.

        Raises:
            InputError: The batch cannot be shared out evenly.
        """
        ranks = self.devices * self.nodes
        micro_batch = self.sequences_at_once(batch_size)
        if batch_size % (ranks * micro_batch):
            raise InputError(
                f"recipe.batch_size={batch_size}: expected a multiple of {ranks} devices x "
                f"{micro_batch} sequences (trainer.micro_batch); change one of the three"
            )
        return batch_size // (ranks * micro_batch)


@dataclasses.dataclass(kw_only=True)
class StageSettings:
    """A further stage of training."""

    recipe: RecipeSettings = MISSING
    """Recipe of the stage."""
    data: DataSettings = MISSING
    """Text of the stage."""


@dataclasses.dataclass(kw_only=True)
class TrainSettings:
    """Settings of `flash train`."""

    backbone: BackboneSettings = MISSING
    """Model that weights are inherited from, and the teacher."""
    data: DataSettings = MISSING
    """Text to train on."""
    recipe: RecipeSettings = MISSING
    """Losses, optimizer and length of the training."""
    trainer: TrainerSettings = MISSING
    """Hardware and intervals."""
    logger: LoggerSettings = MISSING
    """Destination of the figures."""
    arch: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes of the backbone's architecture: none, some (`+arch.ffn_dim=384`), or a file of
    conf/arch (`+arch=flash_650m`)."""
    then: dict[str, StageSettings] = dataclasses.field(default_factory=dict)
    """Stages that follow, by name; each goes on from the result of the one before."""
    scale: float = 1.0
    """Multiplies the tokens of all stages, calibration included."""
    start: str | None = None
    """Trained checkpoint to go on from, with its architecture: the name of a training, or a folder.
    Null cuts one out of the backbone or takes the backbone itself."""
    name: str | None = None
    """Name of the result; null makes one of the arch, or the backbone, and of what is not the
    default, such as `tiny-distill-seed_1`."""
    overwrite: bool = False
    """Replace a finished training of the same name that has other settings, text or weights."""
    seed: int = 0
    """Seed of data order, and of random weights."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        require(0 < self.scale <= 1e6, "scale", self.scale, "a positive number up to 1000000")
        check_seed(self.seed)
        if self.start is not None and not self._inherits(self.recipe):
            raise InputError(
                f"start={self.start}: expected null with recipe.inherit=false, which begins with "
                "random weights; leave start out, or choose another recipe"
            )
        for key, stage in self.then.items():
            if not self._inherits(stage.recipe):
                raise InputError(
                    f"then.{key}.recipe.inherit=false: expected true, as a stage goes on from the "
                    "one before"
                )

    @staticmethod
    def _inherits(recipe: RecipeSettings) -> bool:
        return not isinstance(recipe, RecipeSettings) or recipe.inherit  # else a missing value
