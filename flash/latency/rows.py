"""Conversion of measurements to rows of the store, one row per point, and back."""

from collections.abc import Mapping
from typing import Any

from flash.device.base import Device
from flash.device.measurement import Latency, Measurement
from flash.device.workload import Phase, Point, Workload
from flash.latency.programs import RUNTIME, lowering_values
from flash.latency.store import Conditions, StoredLatency
from flash.lowering.settings import LoweringSettings

PROTOCOL = ("processes", "warmups", "runs")
"""Settings of a device that define its timing protocol."""


def conditions_of(
    device: Device,
    workload: Workload,
    point: Point,
    lowering: LoweringSettings,
    flush_mib: int = 0,
) -> Conditions:
    """Collect everything besides the subject that a latency on this device depends on."""
    timed: dict[str, Any] = {"phase": point.phase.value, "tokens": point.tokens}
    if point.phase is Phase.prefill:
        timed["prefill_chunk"] = lowering.chunk
    else:
        timed["decode_tokens"] = workload.decode_tokens
    if flush_mib:
        timed["flush_mib"] = flush_mib
    return Conditions(
        point=timed,
        protocol={name: getattr(device.settings, name) for name in PROTOCOL},
        lowering=lowering_values(lowering),
        runtime=RUNTIME,
        device=device.identity(),
    )


def of_point(measured: Measurement, point: Point) -> dict[str, Any]:
    """Return the part of a measurement that belongs to one point, as `StoredLatency.result`."""
    latency = measured.latencies[point.name]
    conditions = [dict(each) for each in measured.conditions]
    for each in conditions:
        if "reference_ms" in each:
            each["reference_ms"] = each["reference_ms"][point.name]
    return {
        "ms": latency.ms,
        "se_ms": latency.se_ms,
        "rejected": measured.rejected,
        "load_ms": measured.load_ms,
        "peak_rss_mib": measured.peak_rss_mib,
        "model_rss_mib": measured.model_rss_mib,
        "samples": [
            {"accepted": each["accepted"], "runs": each[point.name]} for each in measured.samples
        ],
        "conditions": conditions,
    }


def joined(name: str, rows: Mapping[Point, StoredLatency]) -> Measurement:
    """Join the rows of all points to one measurement, in which each process appears once.

    Args:
        name: Name of the measurement.
        rows: Row of each point, all of one subject, in whose processes no other program ran.
    """
    samples: dict[float, dict[str, Any]] = {}
    conditions: dict[float, dict[str, Any]] = {}
    for point, row in rows.items():
        for sample, condition in zip(row.result["samples"], row.result["conditions"], strict=True):
            process = condition["started"]
            conditions[process] = condition
            kept = samples.setdefault(process, {"accepted": sample["accepted"]})
            kept[point.name] = sample["runs"]
    results = [row.result for row in rows.values()]
    return Measurement(
        name=name,
        latencies={
            point.name: Latency(ms=row.result["ms"], se_ms=row.result["se_ms"])
            for point, row in rows.items()
        },
        load_ms=min(result["load_ms"] for result in results),
        peak_rss_mib=max(result["peak_rss_mib"] for result in results),
        model_rss_mib=max(result["model_rss_mib"] for result in results),
        rejected=sum(not sample["accepted"] for sample in samples.values()),
        samples=list(samples.values()),
        conditions=list(conditions.values()),
    )
