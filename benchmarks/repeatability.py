"""How far two measurements of the same architecture differ, half an hour or more apart.

Reads what `python benchmarks/flash_space.py --again 10` added to benchmarks/data/flash_space.jsonl:
fresh processes both times, other work of the machine as it came. Cases `prefill` and `decode` are
the longest prompt and context of the workload; the others follow by name.
"""

from datetime import datetime

import flash_space
from record import Recorder

from flash.device import Phase, Point
from flash.latency import Bench, Row, Subject

APART_S = 1800
ARCHITECTURES = 10


def pairs(bench: Bench, point: Point) -> list[tuple[Row, Row]]:
    """First and last measurement of each architecture that has two, far enough apart."""
    found = []
    for spec in flash_space.models():
        attempts = bench.store.attempts(bench.key(Subject(spec=spec), point))
        if len(attempts) > 1:
            first, last = attempts[0], attempts[-1]
            times = (datetime.fromisoformat(row.time_utc) for row in (last, first))
            if next(times).timestamp() - next(times).timestamp() >= APART_S:
                found.append((first, last))
    return found


def main() -> None:
    record = Recorder("repeatability")
    bench = flash_space.open_bench(flash_space.DEVICE, flash_space.ROOT / "runs" / "lowered")
    for phase in Phase:
        points = [point for point in bench.workload.points if point.phase is phase]
        for point in sorted(points, key=lambda point: -point.tokens):
            twice = pairs(bench, point)
            assert len(twice) >= ARCHITECTURES, "run flash_space.py --again 10 first"
            differences = [
                200 * abs(a.result["ms"] - b.result["ms"]) / (a.result["ms"] + b.result["ms"])
                for a, b in twice
            ]
            case = phase.value if point is max(points, key=lambda p: p.tokens) else point.name
            record.add(case, "disagreement_pct", differences, "%")
            record.add(case, "largest_disagreement_pct", [max(differences)], "%")
    record.close()


if __name__ == "__main__":
    main()
