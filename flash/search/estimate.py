"""Estimate of the time that the trials of a search take, before the first one."""

import time

import numpy as np
import torch

from flash.arch import ArchSpec, SearchSpace, training_flops_per_token
from flash.model.decoder import Decoder
from flash.model.losses import Operands, linear_losses
from flash.training.accelerators import main_device
from flash.training.memory import out_of_memory_named
from flash.training.settings import Precision, RecipeSettings, TrainerSettings

_SAMPLE = 64
"""Architectures of the space that the mean work of a trial is taken over."""


def trial_hours(
    space: SearchSpace,
    recipe: RecipeSettings,
    trainer: TrainerSettings,
    seq_len: int,
    backbone: ArchSpec,
) -> float:
    """Estimate the mean duration of a trial's training [hours].

    The step of an architecture of median work is timed, with random weights; other architectures,
    and a teacher that runs along, count by their work.
    """
    specs = space.stratified(np.random.default_rng(0), _SAMPLE)
    flops = {spec: training_flops_per_token(spec, seq_len) for spec in specs}
    median = sorted(specs, key=flops.__getitem__)[len(specs) // 2]
    mean = float(np.mean(list(flops.values())))
    if recipe.kd_weight > 0 and recipe.kd_top_k is None:
        mean += training_flops_per_token(backbone, seq_len) / 3  # forward only
    with out_of_memory_named(recipe, trainer):
        seconds = step_seconds(median, recipe, trainer, seq_len) * mean / flops[median]
    return recipe.steps(seq_len) * seconds / 3600


def step_seconds(
    spec: ArchSpec, recipe: RecipeSettings, trainer: TrainerSettings, seq_len: int
) -> float:
    """Time a training step of `spec` on random tokens, the second of two [seconds]."""
    device = main_device(trainer)
    model = Decoder(spec).to(device)
    model.checkpoint_layers = trainer.activation_checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    at_once = trainer.sequences_at_once(recipe.batch_size)
    tokens = torch.randint(spec.vocab_size, (at_once, seq_len), device=device)
    half = trainer.precision is Precision.bf16
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(trainer.accumulation(recipe.batch_size)):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                student = Operands(model.hidden(tokens).flatten(0, 1), model.lm_head.weight)
                total = linear_losses(student, tokens.flatten()).total
            (total / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def in_words(hours: float) -> str:
    """Write a duration in the unit that suits it."""
    for unit, size in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.0f} {unit}"
    return f"{3600 * hours:.0f} seconds"
