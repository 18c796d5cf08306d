"""Large studies and stores: many trials, many workers, many rows.

- `store`: a measurement store of 100,000 rows. `read_s` from the file, `append_ms` of one further
  row, `rss_mib` of the process that has read it.
- `study`: 16 processes share a study of 10,000 trials in PostgreSQL; a trial takes no time, and
  batches have 64. `trials_per_s` of all together, `repeated` trials that were begun twice, `lost`
  ones that are not complete, `rss_growth_pct` of the workers from a quarter of the trials to the
  end.
- `propose_s`: one batch after 10,000 trials.

`python benchmarks/load.py`; PostgreSQL comes with Debian's package `postgresql`.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from record import SMOKE, Recorder, rss_mib

import conf

sys.path.insert(0, str(conf.ROOT))

from flash.arch import ArchSpec
from flash.latency.store import MeasurementStore
from flash.search.quality import Quality
from flash.search.sampler import propose
from flash.training.loss_curve import Watch
from tests.search import postgres
from tests.search import toy_search as toy

ROWS, TRIALS, WORKERS, BATCH = (100_000, 10_000, 16, 64)
if SMOKE:
    ROWS, TRIALS, WORKERS, BATCH = (200, 16, 2, 4)
SPAWN = multiprocessing.get_context("spawn")
SETTINGS = {"trials": TRIALS, "batch": BATCH, "startup_trials": BATCH}
STORED = conf.ROOT / "benchmarks" / "data" / "smollm2" / "measurements.jsonl"


def store(record: Recorder, folder: Path) -> None:
    path = folder / "measurements.jsonl"
    [row] = [row for row in list(MeasurementStore(STORED))[:1]]
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            subject = {**row.subject, "number": number}
            print(json.dumps(replace(row, subject=subject, attempt=1).to_dict()), file=file)
    began = time.perf_counter()
    read = MeasurementStore(path)
    seconds = time.perf_counter() - began
    if len(read) != ROWS:
        raise SystemExit(f"{len(read)} of {ROWS} rows were read")
    appended = []
    for number in range(ROWS, ROWS + 20):
        began = time.perf_counter()
        read.append(replace(row, subject={**row.subject, "number": number}))
        appended.append(1e3 * (time.perf_counter() - began))
    record.add("store", "read_s", [seconds], "s")
    record.add("store", "append_ms", appended, "ms")
    record.add("store", "rss_mib", [rss_mib()], "MiB")


def work(url: str, log: Path) -> None:
    """Take part in the search, and log each trial with the memory of this process [MiB]."""

    def evaluate(spec: ArchSpec, number: int, watch: Watch) -> Quality:
        with log.open("a", encoding="utf-8") as file:
            print(number, os.getpid(), f"{rss_mib():.1f}", file=file)
        return Quality(toy.loss(spec))

    torch.set_num_threads(1)
    toy.run(url, evaluate=evaluate, **SETTINGS)


def study(record: Recorder, folder: Path) -> None:
    log, data = folder / "log", folder / "server"
    data.mkdir()
    folder.chmod(0o755)
    with postgres.server(data) as url:
        began = time.perf_counter()
        crew = [SPAWN.Process(target=work, args=(url, log)) for _ in range(WORKERS)]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        seconds = time.perf_counter() - began
        if any(process.exitcode for process in crew):
            raise SystemExit("a worker failed")
        settings = toy.make_settings(**SETTINGS)
        trials = toy.open_toy(url, toy.make_space(), settings).trials()
    begun = Counter[str]()
    memory: dict[str, list[float]] = {}
    for line in log.read_text("utf-8").splitlines():
        number, process, mib = line.split()
        begun[number] += 1
        memory.setdefault(process, []).append(float(mib))
    growth = [100 * (each[-1] / each[len(each) // 4] - 1) for each in memory.values()]
    complete = sum(trial.complete for trial in trials)
    record.add("study", "trials_per_s", [len(trials) / seconds], "1/s")
    record.add("study", "repeated", [sum(n > 1 for n in begun.values())], "trials")
    record.add("study", "lost", [TRIALS - complete], "trials")
    record.add("study", "rss_growth_pct", growth, "%")
    problem, times = toy.make_problem(settings), []
    for seed in range(3):
        began = time.perf_counter()
        propose(toy.make_space(), trials, 8, problem=problem, settings=settings, seed=seed)
        times.append(time.perf_counter() - began)
    record.add("study", "propose_s", times, "s")


def main() -> None:
    record = Recorder("load")
    for part in (store, study):
        with tempfile.TemporaryDirectory() as folder:
            part(record, Path(folder))
    record.close()


if __name__ == "__main__":
    main()
