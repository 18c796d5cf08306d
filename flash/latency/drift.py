"""Latencies freed from slow drift of a device, by the reference program that took turns."""

from collections.abc import Sequence

import numpy as np

from flash.device.measurement import standard_error
from flash.device.workload import Phase
from flash.latency.cost_model import Values
from flash.latency.store import StoredLatency

_REFERENCE_NOISE = {Phase.prefill: 1.0, Phase.decode: 1.06}
"""Slowness of a reference program that is taken for noise. Of pairs of measurements of whole models
half an hour and more apart (benchmarks/data/flash_space.jsonl, another whole model standing in for
the reference), prefills at 2048 disagreed by 5.4 % as measured, 3.0 % corrected from 1.03 on and
1.9 % corrected in full; decode steps by 1.9 %, 1.5 % corrected from 1.06 on, 3.0 % in full."""


def comparable(attempts: Sequence[Sequence[StoredLatency]], phase: Phase) -> tuple[Values, Values]:
    """Latencies of subjects and their standard errors [ms], freed from slow drift of the device.

    The processes of all attempts at a subject count as one measurement. Attempts are minutes apart,
    and on a shared machine one may run 15 % slower than another: each is divided by how much slower
    its reference program was than in the best attempt at any subject, beyond the noise of the
    reference itself. The rows keep the raw values.
    """
    best = min(reference_ms(row) for rows in attempts for row in rows)
    limit = _REFERENCE_NOISE[phase] * best
    values, errors = np.empty(len(attempts)), np.empty(len(attempts))
    for i, rows in enumerate(attempts):
        minima = [
            ms / max(1.0, reference_ms(row) / limit)
            for row in rows
            for ms in _process_minima_ms(row, phase)
        ]
        values[i], errors[i] = min(minima), standard_error(minima)
    return values, errors


def _process_minima_ms(row: StoredLatency, phase: Phase) -> list[float]:
    """Smallest time of each accepted process [ms]."""
    processes = [each["runs"] for each in row.result["samples"] if each["accepted"]]
    if phase is Phase.prefill:
        return [1e3 * min(run["wall_s"] for run in runs) for runs in processes]
    return [min(min(run["steps_ms"]) for run in runs) for runs in processes]


def reference_ms(row: StoredLatency) -> float:
    """Latency of the reference program while the row's subject was measured [ms]."""
    return min(each["reference_ms"] for each in row.result["conditions"])
