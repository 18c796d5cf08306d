"""Stage 2: which architectures are worth training, found by Bayesian optimisation."""

from flash.search.fingerprint import space_fingerprint
from flash.search.frontier import write_frontier, write_report
from flash.search.loop import (
    EvaluationError,
    Quality,
    frontier,
    hypervolume_history,
    search,
)
from flash.search.objectives import Costs, Objective, Problem
from flash.search.pareto import choose_winners, hypervolume, non_dominated
from flash.search.sampler import check_limits, propose
from flash.search.settings import Limits, Sampler, SearchSettings
from flash.search.study import Study, Trial, open_study

__all__ = [
    "Costs",
    "EvaluationError",
    "Limits",
    "Objective",
    "Problem",
    "Quality",
    "Sampler",
    "SearchSettings",
    "Study",
    "Trial",
    "check_limits",
    "choose_winners",
    "frontier",
    "hypervolume",
    "hypervolume_history",
    "non_dominated",
    "open_study",
    "propose",
    "search",
    "space_fingerprint",
    "write_frontier",
    "write_report",
]
