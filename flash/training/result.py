"""What a finished training run says about itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.files import write_text
from flash.training.fit import FitResult, ValidationMetrics


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `result.json` beside a trained model says.

    Attributes:
        name: Name of the run.
        spec: The architecture.
        parameters: Trained parameters, tied ones once.
        before: Held-out quality of the inherited weights.
        after: Held-out quality after training.
        fit: Steps, tokens and speed.
        key: Hash of all that decides the result; the run is done when it is unchanged.
        settings: The settings, plain.
    """

    name: str
    spec: ArchSpec
    parameters: int
    before: ValidationMetrics
    after: ValidationMetrics
    fit: FitResult
    key: str
    settings: dict[str, Any]

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"held-out loss {self.before.loss:.3f} -> {self.after.loss:.3f} "
            f"({self.after.bits_per_byte:.3f} bits per byte), {self.fit.tokens:,} tokens"
        )

    def write(self, folder: Path) -> None:
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_text(folder / "result.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "TrainResult | None":
        """The result in `folder`, or None where there is none.

        Raises:
            InputError: The file is damaged.
        """
        path = folder / "result.json"
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text("utf-8"))
            return cls(**{
                **values,
                "spec": ArchSpec.from_dict(values["spec"]),
                "before": ValidationMetrics(**values["before"]),
                "after": ValidationMetrics(**values["after"]),
                "fit": FitResult(**values["fit"]),
            })
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it to train again") from error
