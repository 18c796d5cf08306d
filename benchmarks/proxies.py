"""The paper's Table 2 on this machine: rank correlation of latency with parameters and FLOPs.

The metric is Kendall's tau over the whole models of benchmarks/data/flash_space.jsonl. The paper
reports, on a phone with 100 architectures at 2k tokens: parameters 0.40 (prefill) and 0.40
(decode), FLOPs 0.46 and 0.55.
"""

import flash_space
from record import Recorder
from scipy import stats

from flash.latency.cost_model import SpecTable, flops, parameters
from flash.latency.drift import comparable
from flash.latency.programs import Subject


def main() -> None:
    record = Recorder("proxies")
    bench = flash_space.recorded()
    models = flash_space.models()
    table = SpecTable.of(models)
    for point in bench.workload.points:
        attempts = [bench.attempts(Subject(spec=spec), point) for spec in models]
        values, _ = comparable(attempts, point.phase)
        for name, proxy in (("params", parameters(table)), ("flops", flops(table, point))):
            tau = float(stats.kendalltau(proxy, values)[0])
            record.add(f"{name}/{point}", "kendall_tau", [tau], "ratio")
    record.close()


if __name__ == "__main__":
    main()
