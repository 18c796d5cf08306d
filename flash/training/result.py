"""Result of a finished training run: the file `result.json`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.provenance import provenance
from flash.records import convert, find_json, write_json

LAST = "last.ckpt"
"""Name of the checkpoint that a stopped run resumes from."""
STABLE = "stable.ckpt"
"""Name of the checkpoint of the last step before the learning rate falls. A run for more tokens can
go on from it."""


@dataclasses.dataclass(frozen=True)
class ValidationMetrics:
    """Quality on held-out text.

    Attributes:
        loss: Negative log-likelihood [nats per token].
        bits_per_byte: Negative log-likelihood in bits per UTF-8 byte of the target tokens, which
            can be compared between tokenizers.
        tokens: Number of target tokens.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class FitResult:
    """Length, speed and course of a training run.

    Attributes:
        steps: Optimizer steps in all, including those before the run was resumed.
        tokens: Tokens seen in these steps.
        tokens_per_s: Median rate of the last steps.
        mfu: Share of the machine's measured matrix-product rate.
        peak_rss_mib: Highest resident memory of the process [MiB].
        skipped_steps: Steps left out because their gradient was not finite or their loss a spike.
        curve: Mean training loss of each of up to 32 equal parts of the run [nats per token].
    """

    steps: int
    tokens: int
    tokens_per_s: float
    mfu: float
    peak_rss_mib: float
    skipped_steps: int = 0
    curve: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple(self.curve))  # lists come back from JSON


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a training run; stored as `result.json` next to the checkpoint.

    Attributes:
        name: Name of the run.
        spec: Architecture of the model.
        parameters: Number of parameters; tied ones count once.
        before: Held-out quality of the inherited weights.
        after: Held-out quality after training.
        fit: Steps, tokens and speed of the training.
        key: Hash of all inputs and settings that affect the result; if it is unchanged, the run is
            not repeated.
        settings: Settings of the run as plain values.
        provenance: Command, date, commit, versions and machine; empty in results of older
            versions.
    """

    name: str
    spec: ArchSpec
    parameters: int
    before: ValidationMetrics
    after: ValidationMetrics
    fit: FitResult
    key: str
    settings: dict[str, Any]
    provenance: dict[str, Any] = dataclasses.field(default_factory=provenance, compare=False)

    @property
    def change(self) -> str:
        """Held-out loss before and after."""
        return f"held-out loss {self.before.loss:.3f} -> {self.after.loss:.3f}"

    @property
    def summary(self) -> str:
        """Held-out loss before and after, and number of tokens, in one line."""
        quality = f"{self.change} ({self.after.bits_per_byte:.3f} bits per byte)"
        return f"{quality}, {self.fit.tokens:,} tokens"

    def write(self, folder: Path) -> None:
        """Write `result.json` into `folder`, atomically."""
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_json(folder / "result.json", values)

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the result from `folder`, if there is one."""
        (folder / "result.json").unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> "TrainResult | None":
        """Read the result from `folder`; None if there is none.

        Raises:
            InputError: The file is damaged.
        """

        def build(values: Any) -> "TrainResult":
            return convert(cls, {"provenance": {}, **convert(dict[str, Any], values)})

        return find_json(folder / "result.json", build, "train again")
