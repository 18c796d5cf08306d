"""Estimate of the time that the trials of a search take, before the first one."""

import numpy as np

from flash.arch import ArchSpec, SearchSpace, training_flops_per_token
from flash.training.accelerators import main_device
from flash.training.callbacks import ASSUMED_MFU, measure_peak_flops
from flash.training.settings import RecipeSettings, TrainerSettings

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

    The work is counted, that of a teacher that runs along included; the rate is 40 % of a matrix
    product measured here.
    """
    specs = space.stratified(np.random.default_rng(0), _SAMPLE)
    flops = float(np.mean([training_flops_per_token(spec, seq_len) for spec in specs]))
    if recipe.kd_weight > 0 and recipe.kd_top_k is None:
        flops += training_flops_per_token(backbone, seq_len) / 3  # forward only
    tokens = recipe.steps(seq_len) * recipe.batch_size * seq_len
    peak = measure_peak_flops(main_device(trainer), trainer.precision)
    return tokens * flops / (ASSUMED_MFU * peak) / 3600
