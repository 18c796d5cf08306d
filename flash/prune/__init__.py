"""Importance scores from a calibration pass, and the prune operator that cuts by them."""

from flash.prune.importance import Importance, cached_scores, fingerprint, score
from flash.prune.operator import Selection, check_fits, prune, select

__all__ = [
    "Importance",
    "Selection",
    "cached_scores",
    "check_fits",
    "fingerprint",
    "prune",
    "score",
    "select",
]
