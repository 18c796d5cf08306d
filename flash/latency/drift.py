"""Correction of latencies for slow drift of a device, by a reference program."""

from collections.abc import Sequence

import numpy as np

from flash.device.measurement import standard_error
from flash.device.workload import Phase
from flash.latency.cost_model import Values
from flash.latency.store import StoredLatency

_REFERENCE_NOISE = {Phase.prefill: 1.0, Phase.decode: 1.06}
"""Slowdown of the reference program up to which latencies are not corrected, since it may be noise.

The values were chosen from pairs of measurements of whole models at least half an hour apart
(benchmarks/data/flash_space.jsonl, with another whole model as the reference). Prefill at 2048
differed by 5.4 % without correction, by 3.0 % with a limit of 1.03, and by 1.9 % with a limit of 1;
decode steps by 1.9 % without correction, by 1.5 % with 1.06, and by 3.0 % with 1."""


def comparable(attempts: Sequence[Sequence[StoredLatency]], phase: Phase) -> tuple[Values, Values]:
    """Compute latencies of subjects and their standard errors [ms], corrected for slow drift.

    The processes of all attempts at a subject count as one measurement. Attempts are minutes apart,
    and on a shared machine one may run 15 % slower than another. Each is therefore divided by the
    slowdown of its reference program, relative to the best attempt at any subject, as far as it
    exceeds the noise of the reference itself. The rows keep the raw values.

    Args:
        attempts: Rows of each subject, at least one, all at the same point.
        phase: Phase of that point.

    Returns:
        Two arrays of shape `(len(attempts),)`.
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
    """Return the smallest time of each accepted process [ms]."""
    processes = [each["runs"] for each in row.result["samples"] if each["accepted"]]
    if phase is Phase.prefill:
        return [1e3 * min(run["wall_s"] for run in runs) for runs in processes]
    return [min(min(run["steps_ms"]) for run in runs) for runs in processes]


def reference_ms(row: StoredLatency) -> float:
    """Return the latency of the reference program while the subject was measured [ms]."""
    return min(each["reference_ms"] for each in row.result["conditions"])
