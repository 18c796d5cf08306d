"""Latency of any architecture from few measurements (stage 1 of the search)."""

from flash.latency.active import ErrorEstimate, Stop, choose, extrapolates, stop
from flash.latency.bench import Bench, Subject, comparable, conditions_of, device_s, of_point
from flash.latency.blocks import BlockPredictor, Calibration
from flash.latency.composition import BlockTable, Grid, Part, grid_points
from flash.latency.contexts import Interpolated
from flash.latency.gp import GaussianProcess
from flash.latency.physical import Physical
from flash.latency.prediction import (
    Prediction,
    Predictor,
    Scores,
    cross_predict,
    cross_validate,
    score,
)
from flash.latency.proxies import PowerLaw
from flash.latency.regression import GaussianRegression, NonNegativeRegression
from flash.latency.settings import LatencySettings, PredictorKind
from flash.latency.stage import (
    LatencyModel,
    collect,
    grid_subjects,
    make_bench,
    make_grid,
    whole_models,
)
from flash.latency.store import Conditions, MeasurementStore, Row, SubjectKind
from flash.latency.transfer import Transferred
from flash.latency.work import SpecTable

__all__ = [
    "Bench",
    "BlockPredictor",
    "BlockTable",
    "Calibration",
    "Conditions",
    "ErrorEstimate",
    "GaussianProcess",
    "GaussianRegression",
    "Grid",
    "Interpolated",
    "LatencyModel",
    "LatencySettings",
    "MeasurementStore",
    "NonNegativeRegression",
    "Part",
    "Physical",
    "PowerLaw",
    "Prediction",
    "Predictor",
    "PredictorKind",
    "Row",
    "Scores",
    "SpecTable",
    "Stop",
    "Subject",
    "SubjectKind",
    "Transferred",
    "choose",
    "collect",
    "comparable",
    "conditions_of",
    "cross_predict",
    "cross_validate",
    "device_s",
    "extrapolates",
    "grid_points",
    "grid_subjects",
    "make_bench",
    "make_grid",
    "of_point",
    "score",
    "stop",
    "whole_models",
]
