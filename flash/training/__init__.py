"""Training: settings, LightningModule, callbacks, and the one call that runs them."""

from flash.training.fit import FitResult, HeldOut, fit, heldout_quality, peak_rss_mib
from flash.training.module import LanguageModelling
from flash.training.settings import Precision, RecipeSettings, Schedule, TrainerSettings

__all__ = [
    "FitResult",
    "HeldOut",
    "LanguageModelling",
    "Precision",
    "RecipeSettings",
    "Schedule",
    "TrainerSettings",
    "fit",
    "heldout_quality",
    "peak_rss_mib",
]
