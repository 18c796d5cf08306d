"""How far two measurements of the same architecture differ, half an hour or more apart.

Reads benchmarks/data/flash_space.jsonl, to which `python benchmarks/flash_space.py --again 10` adds
an attempt at each time. Compared are consecutive attempts, three fresh processes each, raw, other
work of the machine as it came. Cases `prefill` and `decode` are the longest prompt and context of
the workload; the others follow by name.
"""

import itertools
from datetime import datetime

import flash_space
from record import Recorder

from flash.device import Phase, Point
from flash.latency import Bench, Row, Subject

APART_S = 1800
ARCHITECTURES = 10


def pairs(bench: Bench, point: Point) -> list[tuple[float, float]]:
    """Consecutive measurements of the same architecture, far enough apart [ms]."""
    found = []
    for spec in flash_space.models()[:ARCHITECTURES]:
        attempts = bench.attempts(Subject(spec=spec), point)
        for first, last in itertools.pairwise(attempts):
            if _time_s(last) - _time_s(first) >= APART_S:
                found.append((first.result["ms"], last.result["ms"]))
    return found


def _time_s(row: Row) -> float:
    return datetime.fromisoformat(row.time_utc).timestamp()


def main() -> None:
    record = Recorder("repeatability")
    bench = flash_space.open_bench(flash_space.DEVICE, flash_space.ROOT / "runs" / "lowered")
    for phase in Phase:
        points = [point for point in bench.workload.points if point.phase is phase]
        for point in sorted(points, key=lambda point: -point.tokens):
            twice = pairs(bench, point)
            assert len(twice) >= ARCHITECTURES, "run flash_space.py --again 10"
            differences = [200 * abs(a - b) / (a + b) for a, b in twice]
            case = phase.value if point is max(points, key=lambda p: p.tokens) else point.name
            record.add(case, "disagreement_pct", differences, "%")
            record.add(case, "largest_disagreement_pct", [max(differences)], "%")
    record.close()


if __name__ == "__main__":
    main()
