"""A predictor for a second device from few measurements of its own and what the first one taught.

Both devices are working points of this machine, one and two threads, measured in
benchmarks/data/flash_space.jsonl. For each number n of own models, drawn 20 times, `transfer/n` is
fitted to them and starts from the first device's predictor, which `scratch/n` lacks. `mape_pct` is
of the models that were not drawn; `first/0` uses the first device's predictions, scaled by nothing.
"""

import flash_space
import numpy as np
from record import Recorder

from flash.latency import Physical, Subject, Transferred, comparable

ROUNDS = 20
NUMBERS = (4, 6, 8, 12, 16)


def main() -> None:
    record = Recorder("transfer")
    cache = flash_space.ROOT / "runs" / "lowered"
    first = flash_space.open_bench(flash_space.DEVICE, cache)
    second = flash_space.open_bench(flash_space.second_device(), cache)
    models = flash_space.models()
    for point in second.workload.points:

        def measured(bench, point=point) -> tuple[np.ndarray, np.ndarray]:
            attempts = [bench.attempts(Subject(spec=spec), point) for spec in models]
            return comparable(attempts, point.phase)

        def physical(point=point) -> Physical:
            return Physical(point, first.lowering, first.workload.prefill_chunk)

        source = physical().fit(models, *measured(first))
        values, errors = measured(second)
        unadapted = 100 * np.abs(source.predict(models).mean / values - 1)
        record.add(f"first/0/{point}", "mape_pct", [float(unadapted.mean())], "%")
        rng = np.random.default_rng(0)
        draws = [rng.permutation(len(models)) for _ in range(ROUNDS)]
        for num in NUMBERS:
            mape: dict[str, list[float]] = {"transfer": [], "scratch": []}
            for order in draws:
                own, rest = order[:num], order[num:]
                specs = [models[i] for i in own]
                for name, unfitted in (("transfer", Transferred(source)), ("scratch", physical())):
                    fitted = unfitted.fit(specs, values[own], errors[own])
                    predicted = fitted.predict([models[i] for i in rest]).mean
                    mape[name].append(100 * float(np.abs(predicted / values[rest] - 1).mean()))
            for name, each in mape.items():
                record.add(f"{name}/{num}/{point}", "mape_pct", each, "%")
    record.close()


if __name__ == "__main__":
    main()
