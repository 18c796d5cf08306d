"""What an export found, as the file that the report reads."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.device.measurement import Measurement
from flash.records import find_json, write_json
from flash.training.result import ValidationMetrics


@dataclass(frozen=True)
class ProgramQuality:
    """Losses on the same tokens [nats a token].

    Attributes:
        float_loss: Of the float decoder.
        pte_loss: Of the program on the device.
        tokens: How many tokens were predicted.
        agreement: Share of them where both find the same token likeliest.
    """

    float_loss: float
    pte_loss: float
    tokens: int
    agreement: float

    @property
    def change_pct(self) -> float:
        """Change of perplexity from the float decoder to the program [%]."""
        return 100 * math.expm1(self.pte_loss - self.float_loss)


@dataclass(frozen=True)
class ExportResult:
    """One exported model on one device; `export.json` beside its `model.pte`.

    Attributes:
        name: Name of the model.
        spec: Its architecture.
        parameters: Tied ones once.
        quality: Held-out quality of the float weights.
        artefact: Loss of the program against the float decoder's.
        pte_bytes: Size of the program.
        gate: Report of the parity gate.
        measurement: Latencies on the device.
        reference: Name of the program that took turns with this one; None for the backbone itself.
        speedups: Latency of the reference over this one's at each point, both from the same
            processes; empty without a reference.
        predicted: What stage 1 predicted, with intervals; None for an arch that no search found.
        prompt: What the program was asked to continue.
        completion: What it wrote.
        device: Identity of the device.
        lower_s: Seconds from weights to file.
        key: Hash of all that decides the result.
        weights: Hash of the checkpoint that was exported; empty in results of older versions.
    """

    name: str
    spec: ArchSpec
    parameters: int
    quality: ValidationMetrics
    artefact: ProgramQuality
    pte_bytes: int
    gate: dict[str, Any]
    measurement: Measurement
    reference: str | None
    speedups: dict[str, float]
    predicted: dict[str, Any] | None
    prompt: str
    completion: str
    device: dict[str, Any]
    lower_s: float
    key: str
    weights: str = ""

    def write(self, folder: Path) -> None:
        """Store as `export.json`, atomically."""
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_json(folder / "export.json", values)

    @classmethod
    def read(cls, folder: Path) -> "ExportResult | None":
        """The result in `folder`, or None where there is none.

        Raises:
            InputError: The file is damaged.
        """
        return find_json(folder / "export.json", cls._from_json, "export again")

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> "ExportResult":
        nested = {
            "spec": ArchSpec.from_dict(values["spec"]),
            "quality": ValidationMetrics(**values["quality"]),
            "artefact": ProgramQuality(**values["artefact"]),
            "measurement": Measurement.from_dict(values["measurement"]),
        }
        return cls(**{**values, **nested})
