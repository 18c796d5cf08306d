"""Settings of training: the recipe (what is learned, how) and the trainer (on what)."""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum

import torch

from flash.errors import require


class Schedule(Enum):
    """Learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"
    """Warm-up, stable, then a linear decay over the last part."""


class Precision(Enum):
    """Arithmetic of forward and backward; weights and optimiser states stay float32."""

    fp32 = "32-true"
    bf16 = "bf16-mixed"
    auto = "auto"
    """bf16 where the processor has instructions for it, else fp32: emulated, bf16 is five times
    slower than fp32 (seen on AVX2)."""


def native_precision(accelerator: str) -> Precision:
    """What `Precision.auto` stands for on this machine."""
    if accelerator != "cpu" and (accelerator != "auto" or torch.accelerator.is_available()):
        return Precision.bf16
    known = torch.cpu.get_capabilities()
    native = any(known.get(key, False) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return Precision.bf16 if native else Precision.fp32


@dataclass(kw_only=True)
class RecipeSettings:
    """Config group `recipe`. The paper states none of these values for Flash."""

    name: str
    tokens: int
    """Training tokens; the number of steps follows from it."""
    batch_size: int = 8
    """Sequences a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay_ratio: float = 0.25
    """Share of the steps over which `wsd` decays."""
    schedule: Schedule = Schedule.cosine
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest gradient norm."""
    kd_weight: float = 0.0
    """Weight of the distillation loss; cross-entropy gets the rest. 0 needs no teacher."""
    temperature: float = 1.0
    """Softens teacher and student in the distillation loss."""
    calibration_tokens: int = 65536
    """Training tokens that the importance scores are averaged over."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "calibration_tokens"):
            value = getattr(self, name)
            require(value > 0, f"recipe.{name}", value, "a positive integer")
        for name in ("lr", "grad_clip", "temperature"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0, f"recipe.{name}", value, "a positive number"
            )
        for name in ("final_lr_ratio", "warmup_ratio", "decay_ratio", "kd_weight"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"recipe.{name}", value, "a number from 0 to 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"recipe.{name}", value, "a number from 0 to below 1")
        require(self.weight_decay >= 0, "recipe.weight_decay", self.weight_decay, "0 or more")

    def steps(self, seq_len: int) -> int:
        """Optimiser steps for `tokens` tokens."""
        return max(1, math.ceil(self.tokens / (self.batch_size * seq_len)))

    def stable_steps(self, seq_len: int) -> int:
        """Steps before the learning rate falls, at which a run can go on for more tokens; or 0."""
        if self.schedule is not Schedule.wsd:
            return 0
        steps = self.steps(seq_len)
        warmup = round(self.warmup_ratio * steps)
        return steps - min(steps - warmup, round(self.decay_ratio * steps))

    def longer(self, tokens: int, seq_len: int) -> "RecipeSettings":
        """The same recipe for more tokens; with `wsd` its first `stable_steps` are the same."""
        warmup = round(self.warmup_ratio * self.steps(seq_len))
        recipe = dataclasses.replace(self, tokens=tokens)
        return dataclasses.replace(recipe, warmup_ratio=warmup / recipe.steps(seq_len))

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate at a 0-based step as a share of the peak."""
        warmup = round(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / warmup
        decay = steps - warmup
        if self.schedule is Schedule.wsd:
            decay = min(decay, round(self.decay_ratio * steps))
        left = min(1.0, (steps - step) / max(decay, 1))
        if self.schedule is Schedule.cosine:
            left = 0.5 * (1 - math.cos(math.pi * left))
        return self.final_lr_ratio + (1 - self.final_lr_ratio) * left


@dataclass(kw_only=True)
class TrainerSettings:
    """Config group `trainer`: Lightning's part."""

    accelerator: str = "cpu"
    """Lightning accelerator: cpu, gpu, auto, ..."""
    devices: int = 1
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

    def __post_init__(self) -> None:
        for name in ("devices", "eval_every_steps", "checkpoint_every_steps", "log_every_steps"):
            value = getattr(self, name)
            require(value > 0, f"trainer.{name}", value, "a positive integer")
        require(
            self.max_steps is None or self.max_steps > 0,
            "trainer.max_steps",
            self.max_steps,
            "a positive integer or null",
        )
        known = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
        require(
            self.accelerator in known,
            "trainer.accelerator",
            self.accelerator,
            f"one of {', '.join(known)}",
        )
        if self.precision is Precision.auto:
            self.precision = native_precision(self.accelerator)
