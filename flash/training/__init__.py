"""Training: settings, LightningModule, callbacks, and the one call that runs them."""

from flash.training.curve import Curve, Watch
from flash.training.fit import STABLE, FitResult, HeldOut, fit, heldout_quality, peak_rss_mib
from flash.training.module import LanguageModelling
from flash.training.settings import (
    LrReference,
    OnSpike,
    Precision,
    RecipeSettings,
    Schedule,
    Strategy,
    TrainerSettings,
)

__all__ = [
    "STABLE",
    "Curve",
    "FitResult",
    "HeldOut",
    "LanguageModelling",
    "LrReference",
    "OnSpike",
    "Precision",
    "RecipeSettings",
    "Schedule",
    "Strategy",
    "TrainerSettings",
    "Watch",
    "fit",
    "heldout_quality",
    "peak_rss_mib",
]
