"""Latency of any architecture from few measurements (stage 1 of the search)."""

from flash.latency.blocks import BlockPredictor, Calibration
from flash.latency.composition import BlockTable, Grid, Part, grid_points
from flash.latency.gp import GaussianProcess
from flash.latency.prediction import (
    Prediction,
    Predictor,
    Scores,
    cross_predict,
    cross_validate,
    score,
)
from flash.latency.proxies import PowerLaw
from flash.latency.settings import LatencySettings, Objective, PredictorKind
from flash.latency.stage import LatencyModel, collect, conditions_of, make_grid, whole_models
from flash.latency.store import Conditions, MeasurementStore, Row, SubjectKind

__all__ = [
    "BlockPredictor",
    "BlockTable",
    "Calibration",
    "Conditions",
    "GaussianProcess",
    "Grid",
    "LatencyModel",
    "LatencySettings",
    "MeasurementStore",
    "Objective",
    "Part",
    "PowerLaw",
    "Prediction",
    "Predictor",
    "PredictorKind",
    "Row",
    "Scores",
    "SubjectKind",
    "collect",
    "conditions_of",
    "cross_predict",
    "cross_validate",
    "grid_points",
    "make_grid",
    "score",
    "whole_models",
]
