"""How far two measurements of the same architecture differ, half an hour or more apart.

Reads benchmarks/data/flash_space.jsonl, to which `python benchmarks/flash_space.py --again 10` adds
an attempt at each time. A measurement is two attempts of three fresh processes each; the first two
are compared with the last two, raw, other work of the machine as it came. Cases `prefill` and
`decode` are the longest prompt and context of the workload; the others follow by name.
"""

from datetime import datetime

import flash_space
from record import Recorder

from flash.device import Phase, Point
from flash.latency import Bench, Row, Subject

APART_S = 1800
ARCHITECTURES, ATTEMPTS = 10, 2


def pairs(bench: Bench, point: Point) -> list[tuple[float, float]]:
    """Both measurements of each architecture that has two far enough apart [ms]."""
    found = []
    for spec in flash_space.models():
        attempts = bench.attempts(Subject(spec=spec), point)
        first, last = attempts[:ATTEMPTS], attempts[-ATTEMPTS:]
        if len(attempts) >= 2 * ATTEMPTS and _time_s(last[0]) - _time_s(first[-1]) >= APART_S:
            found.append((_ms(first), _ms(last)))
    return found


def _ms(rows: list[Row]) -> float:
    return min(row.result["ms"] for row in rows)


def _time_s(row: Row) -> float:
    return datetime.fromisoformat(row.time_utc).timestamp()


def main() -> None:
    record = Recorder("repeatability")
    bench = flash_space.open_bench(flash_space.DEVICE, flash_space.ROOT / "runs" / "lowered")
    for phase in Phase:
        points = [point for point in bench.workload.points if point.phase is phase]
        for point in sorted(points, key=lambda point: -point.tokens):
            twice = pairs(bench, point)
            assert len(twice) >= ARCHITECTURES, "run flash_space.py --again 10, later once more"
            differences = [200 * abs(a - b) / (a + b) for a, b in twice]
            case = phase.value if point is max(points, key=lambda p: p.tokens) else point.name
            record.add(case, "disagreement_pct", differences, "%")
            record.add(case, "largest_disagreement_pct", [max(differences)], "%")
    record.close()


if __name__ == "__main__":
    main()
