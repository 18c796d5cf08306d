"""Config group `latency`: predictor of latencies, and the measurements that it is fitted to."""

from dataclasses import dataclass
from enum import Enum

from flash.device.workload import Phase
from flash.errors import require


class PredictorKind(Enum):
    """Models of the latency of an architecture that was never measured."""

    analytical = "analytical"
    """Counted work of whole models, times what each kind of work costs on the device."""
    blocks = "blocks"
    """Measured half-blocks, added up and calibrated on a few whole models."""
    gp = "gp"
    """The paper's: a Gaussian process fitted to whole models (Sec. 3.4)."""
    params = "params"
    """A power law in the parameter count; a baseline."""
    flops = "flops"
    """A power law in the FLOPs of the phase; a baseline."""


@dataclass(kw_only=True)  # not frozen: omegaconf would refuse overrides
class LatencySettings:
    """Prediction of latencies (stage 1)."""

    predictor: PredictorKind = PredictorKind.blocks
    """Predictor of prefill and decode latency."""
    objective: Phase = Phase.prefill
    """Latency that the search minimises, at the device's first prompt length or context."""
    grid_widths: int = 3
    """`blocks`: values of model_dim that blocks are measured at, evenly spaced, ends included."""
    grid_ffn: int = 3
    """`blocks`: values of ffn_dim that FFN halves are measured at, for each model_dim."""
    calibration_models: int = 4
    """`blocks`: whole models, beside the backbone, that calibrate the sum of blocks."""
    whole_models: int = 32
    """Whole models, beside the backbone, to fit to; the paper has 800. `analytical` measures no
    more than these, `gp`, `params` and `flops` exactly these."""
    target_error_pct: float = 5.0
    """`analytical`: measuring goes on, a group of the most informative models at a time, until the
    mean error of models left out of their own fit is surely below this [%]."""
    transfer_from: str | None = None
    """`analytical`: name of another device in the store, whose measurements of the same programs
    this one's predictor starts from, so that it needs fewer of its own; null starts from none."""
    group_size: int = 8
    """Programs measured together; a kill loses at most one group of measurements."""
    precision_pct: float = 2.0
    """Standard error that a prefill latency should have, and half of a decode step's; what is less
    precise is measured again [%]."""
    attempts: int = 3
    """Most measurements of one program; all of them count together."""
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
            ("attempts", 1),
        ):
            value = getattr(self, name)
            require(
                type(value) is int and value >= least,
                name,
                value,
                f"an integer of at least {least}",
            )

        for name in ("target_error_pct", "precision_pct"):
            value = getattr(self, name)
            require(value > 0, name, value, "a number above 0")

    @property
    def num_whole_models(self) -> int:
        """Whole models that the chosen predictor may need, the backbone not counted."""
        blocks = self.predictor is PredictorKind.blocks
        return self.calibration_models if blocks else self.whole_models
