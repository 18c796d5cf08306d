"""Config group `latency`: how latencies are predicted, and from how many measurements."""

from dataclasses import dataclass
from enum import Enum

from flash.errors import require


class PredictorKind(Enum):
    """What the latency of an architecture that was never measured is predicted from."""

    blocks = "blocks"
    """Measured half-blocks, added up and calibrated on a few whole models."""
    gp = "gp"
    """The paper's: a Gaussian process fitted to whole models (Sec. 3.4)."""
    params = "params"
    """A power law in the parameter count; a baseline."""
    flops = "flops"
    """A power law in the FLOPs of the phase; a baseline."""


class Objective(Enum):
    """Which latency the search minimises."""

    prefill = "prefill"
    """Time to first token, as in the paper."""
    decode = "decode"
    """Time of one generated token at the workload's context."""


@dataclass(kw_only=True)  # not frozen: omegaconf would refuse overrides
class LatencySettings:
    """How latencies are predicted (stage 1)."""

    predictor: PredictorKind = PredictorKind.blocks
    """Predictor of prefill and decode latency."""
    objective: Objective = Objective.prefill
    """Latency that the search minimises."""
    grid_widths: int = 3
    """`blocks`: values of model_dim that blocks are measured at, evenly spaced, ends included."""
    grid_ffn: int = 3
    """`blocks`: values of ffn_dim that FFN halves are measured at, for each model_dim."""
    calibration_models: int = 4
    """`blocks`: whole models, beside the backbone, that calibrate the sum of blocks."""
    whole_models: int = 32
    """`gp`, `params`, `flops`: whole models, beside the backbone, to fit to; the paper has 800."""
    group_size: int = 8
    """Programs measured together; a kill loses at most one group of measurements."""

    keep_programs: bool = True
    """Keep the lowered programs once they are measured: another device or workload needs them
    again, but hundreds of large models fill a disk."""

    def __post_init__(self) -> None:
        for name, least in (
            ("grid_widths", 2),
            ("grid_ffn", 2),
            ("calibration_models", 2),
            ("whole_models", 4),
            ("group_size", 1),
        ):
            value = getattr(self, name)
            require(
                type(value) is int and value >= least,
                f"latency.{name}",
                value,
                f"an integer of at least {least}",
            )

    @property
    def num_whole_models(self) -> int:
        """Whole models that the chosen predictor needs, the backbone not counted."""
        blocks = self.predictor is PredictorKind.blocks
        return self.calibration_models if blocks else self.whole_models
