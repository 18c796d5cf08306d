"""Latencies that a search predicted, in the state that the machine has during an export."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash.arch import ArchSpec
from flash.commands import command
from flash.device.base import Device
from flash.errors import InputError
from flash.latency.programs import lowering_values
from flash.lowering.settings import LoweringSettings
from flash.paths import Runs
from flash.records import plain, read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictedLatencies:
    """Latencies of an architecture that stage 1 of a search predicted.

    Attributes:
        by_point: `mean_ms` and the ends of the 90 % interval, `low_ms` and `high_ms`, by name of
            the point.
        backbone: Backbone of the search, under which its program is known.
        backbone_ms: Latency of the backbone that stage 1 measured, by name of the point [ms].
    """

    by_point: Mapping[str, Mapping[str, float]]
    backbone: ArchSpec
    backbone_ms: Mapping[str, float]

    def at(
        self, reference: ArchSpec | None, reference_ms: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """Return the latencies for the state of the machine in which a reference was timed.

        Stage 1 corrects its latencies to the fastest state of the machine that it saw; minutes
        later the same machine may be 10 % slower. Each latency is therefore multiplied by the
        slowdown of the backbone, which is added as `slowdown`.

        Args:
            reference: Architecture that was timed in the same processes. Another one than the
                backbone of the search, or None, leaves the latencies as they were predicted.
            reference_ms: Latency of the reference by name of the point [ms].
        """
        known: Mapping[str, float] = {}
        if reference is not None and reference.as_program() == self.backbone:
            known = reference_ms
        found = {}
        for point, values in self.by_point.items():
            slowdown = known[point] / self.backbone_ms[point] if point in known else 1.0
            scaled = {key: slowdown * value for key, value in values.items()}
            found[point] = {**scaled, "slowdown": slowdown}
        return found


def predicted_latencies(
    runs: Runs, device: Device, lowering: LoweringSettings, spec: ArchSpec
) -> PredictedLatencies | None:
    """Find what a search on this device, with this lowering, predicted for an architecture."""
    identity, wanted = plain(device.identity()), plain(spec.to_dict())
    values_of_program = plain(lowering_values(lowering))

    def prediction(found: dict[str, Any]) -> PredictedLatencies | None:
        if found["device"] != identity or found.get("lowering") != values_of_program:
            return None
        specs = {trial["number"]: trial["spec"] for trial in found["trials"]}
        numbers = [number for number in found["predicted"] if specs[int(number)] == wanted]
        backbone = found["backbone"]
        if numbers:
            values = found["predicted"][numbers[0]]
        elif backbone["spec"] == wanted:
            values = backbone["predicted"]
        else:
            return None
        return PredictedLatencies(
            by_point=values,
            backbone=ArchSpec.from_dict(backbone["spec"]).as_program(),
            backbone_ms={point: every[-1] for point, every in found["latency_points"].items()},
        )

    for path in sorted((runs.root / "studies").glob("*/frontier.json")):
        try:
            found = read_json(path, prediction, f"run {command('search')} again")
        except InputError as error:  # an export only looks at it
            log.warning("%s; no prediction is taken from it", error)
            continue
        if found is not None:
            return found
    return None
