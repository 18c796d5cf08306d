"""Result of an export: the file `export.json`, which the report reads."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.device.base import Device
from flash.device.measurement import Measurement
from flash.device.settings import DeviceSettings
from flash.errors import InputError
from flash.lowering.loss_change import LossChange
from flash.paths import Runs
from flash.provenance import provenance
from flash.records import convert, digest, find_json, write_json
from flash.renamed import present_keys
from flash.training.result import ValidationMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProgramQuality:
    """Comparison of a program with the float decoder on the same tokens.

    Attributes:
        change: Losses of both; the standard error is NaN in results of older versions.
        agreement: Share of positions with the same likeliest token in both.
    """

    change: LossChange
    agreement: float

    @staticmethod
    def present(values: dict[str, Any]) -> dict[str, Any]:
        """Return plain values in the present form; those of older versions had one level."""
        values = present_keys(values)
        return {"change": {"se": math.nan, **values}, **values}


@dataclass(frozen=True)
class ExportResult:
    """One exported model on one device; stored as `export.json` next to its `model.pte`.

    Attributes:
        name: Name of the model.
        spec: Architecture of the model.
        parameters: Number of parameters; tied ones count once.
        quality: Held-out quality of the float weights.
        program_quality: Loss of the program, compared with the float decoder's.
        pte_bytes: Size of the program [bytes].
        gate: Report of the parity gate.
        measurement: Latencies on the device.
        reference: Name of the backbone whose program was timed in the same processes; None if
            there was none.
        speedups: Latency of the reference divided by this program's at each point, both from the
            same processes; empty without a reference.
        predicted: Latencies that stage 1 predicted, with intervals, for the state of the machine
            during the measurement (`flash.export.predicted`); None for an architecture that no
            search found.
        prompt: Text that the program continued.
        completion: Continuation by the program.
        device: Identity of the device.
        lower_s: Time of the lowering [s].
        key: Hash of all inputs and settings that affect the result.
        weights: Hash of the exported checkpoint; empty in results of older versions.
        provenance: Command, date, commit, versions and machine; empty in results of older
            versions.
        conditions: `device_conditions` of the measurement; empty in results of older versions.
    """

    name: str
    spec: ArchSpec
    parameters: int
    quality: ValidationMetrics
    program_quality: ProgramQuality
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
    provenance: dict[str, Any] = dataclasses.field(default_factory=provenance, compare=False)
    conditions: str = ""

    def write(self, folder: Path) -> None:
        """Write `export.json` into `folder`, atomically."""
        values = {**dataclasses.asdict(self), "spec": self.spec.to_dict()}
        write_json(folder / "export.json", values)

    @classmethod
    def read(cls, folder: Path) -> "ExportResult | None":
        """Read the result from `folder`; None if there is none.

        Raises:
            InputError: The file is damaged.
        """
        return find_json(folder / "export.json", cls._from_json, "export again")

    @classmethod
    def _from_json(cls, values: Any) -> "ExportResult":
        found = {"provenance": {}, **present_keys(convert(dict[str, Any], values))}
        if isinstance(found.get("program_quality"), dict):
            found["program_quality"] = ProgramQuality.present(found["program_quality"])
        return convert(cls, found)


def device_conditions(device: Device, settings: DeviceSettings) -> str:
    """Hash device, runtime and settings; latencies with the same hash are comparable."""
    return digest({"device": device.identity(), "settings": settings.identity()})


def exports(runs: Runs) -> Iterator[ExportResult]:
    """Iterate over all exported programs, by name; damaged results are skipped with a warning."""
    for path in sorted((runs.root / "exports").glob("*/export.json")):
        try:
            result = ExportResult.read(path.parent)
        except InputError as error:
            log.warning("%s", error)
            continue
        if result is not None and path.with_name("model.pte").is_file():
            yield result
