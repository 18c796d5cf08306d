"""Latencies that a search predicted, in the state that the machine has during an export."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flash.arch import ArchSpec
from flash.device.base import Device
from flash.errors import InputError
from flash.latency.programs import lowering_values
from flash.lowering.settings import LoweringSettings
from flash.paths import Runs
from flash.records import plain
from flash.search.stored import StoredDevice, StoredStudy, read_study

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
    """Find what a search for this device, with this lowering, predicted for an architecture."""
    identity, program = plain(device.identity()), plain(lowering_values(lowering))
    for path in sorted((runs.root / "studies").glob("*/frontier.json")):
        try:
            study = read_study(path)
        except InputError as error:  # an export only looks at it
            log.warning("%s; no prediction is taken from it", error)
            continue
        for stored in _devices(study):
            if stored.device == identity and stored.lowering == program:
                found = _of_study(study, stored, spec)
                if found is not None:
                    return found
    return None


def _devices(study: StoredStudy) -> Iterator[StoredDevice]:
    """Iterate over the devices of a search, the first one first."""
    yield StoredDevice(
        device=study.device,
        lowering=study.lowering,
        predicted=study.predicted,
        backbone_predicted=study.backbone.predicted,
        latency_scores=study.latency_scores,
        latency_points=study.latency_points,
    )
    yield from study.devices.values()


def _of_study(
    study: StoredStudy, device: StoredDevice, spec: ArchSpec
) -> PredictedLatencies | None:
    specs = {str(trial.number): trial.spec for trial in study.trials}
    backbone = study.backbone
    numbers = [number for number in device.predicted if specs.get(number) == spec]
    if numbers:
        values = device.predicted[numbers[0]]
    elif backbone.spec == spec:
        values = device.backbone_predicted
    else:
        return None
    return PredictedLatencies(
        by_point=plain(values),
        backbone=backbone.spec.as_program(),
        backbone_ms={point: every[-1] for point, every in device.latency_points.items()},
    )
