"""Our programs compared with ExecuTorch's own export of the same shape: prefill and decode at 2k.

The models are flash_350m and flash_650m with random weights in 8da4w with groups of 32, a 4-bit
embedding and a float cache (the faster of the two caches of the stock exporter on x86). A prompt of
2,048 tokens is processed in the chunks that suit each best: 1,024 tokens in the stock program, 256
in ours. Fresh processes of both alternate. `prefill_speedup` and `decode_speedup` are the stock
time divided by ours, pair by pair; `peak_rss_mib` is the peak memory of the measuring process,
Python and torch included.

Programs are kept in runs/serving, so a second run only measures.
`python benchmarks/serving.py [--threads N] [MODEL ...]`; without models it keeps the results.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from record import Recorder

import conf
from flash.device.host import HostDevice
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder

MODELS = ("flash_350m", "flash_650m")
CONTEXT, DECODE, TURNS = 2048, 16, 3
FORMS = {"ours": AttentionForm.matmul, "stock": AttentionForm.sdpa}
"""Form of attention of each program; the default chunk follows from it."""
FOLDER = Path("runs/serving")


def device(threads: int, way: str) -> HostDevice:
    return HostDevice(
        DeviceSettings(
            name="host",
            threads=threads,
            processes=1,
            warmups=1,
            runs=1,
            run_timeout_s=600.0,
            lowering=LoweringSettings(attention=FORMS[way], max_context=CONTEXT + 2 * DECODE),
            workload=Workload(prompts=[CONTEXT], contexts=[CONTEXT], decode_tokens=DECODE),
        )
    )


def lower_one(way: str, model: str, path: Path) -> None:
    """Write one program; must run in its own process, whose end frees the memory."""
    spec, settings = conf.winner(model), device(1, way).settings.lowering
    if way == "stock":
        lower_stock(to_stock_model(spec), settings, path)
    else:
        write(path, lower(Decoder(spec), settings))


def program(way: str, model: str) -> Program:
    path = FOLDER / f"{model}-{way}.pte"
    if not path.is_file():
        command = [sys.executable, __file__, "--lower", way, model, str(path)]
        subprocess.run(command, check=True)
    return Program(name=way, path=path, vocab_size=conf.winner(model).vocab_size)


def least(measured: Measurement, point: str) -> float:
    """Return the milliseconds of the fastest run, or of the fastest step of all runs."""
    [samples] = measured.samples
    steps = [step for run in samples[point] for step in run.get("steps_ms", ())]
    return min(steps) if steps else 1e3 * min(run["wall_s"] for run in samples[point])


def compare(record: Recorder, model: str, threads: int) -> None:
    hosts = {way: device(threads, way) for way in FORMS}
    programs = {way: program(way, model) for way in FORMS}
    found: dict[str, list[Measurement]] = {way: [] for way in FORMS}
    for _ in range(TURNS):
        for way, host in hosts.items():
            found[way] += host.measure([programs[way]], host.settings.workload)
    for name, point in (("prefill", f"prefill_{CONTEXT}"), ("decode", f"decode_{CONTEXT}")):
        times = {way: [least(each, point) for each in all_] for way, all_ in found.items()}
        speedups = [b / a for a, b in zip(times["ours"], times["stock"], strict=True)]
        record.add(model, f"{name}_speedup", speedups, "ratio")
        for way in FORMS:
            record.add(f"{model}/{way}", f"{name}_ms", times[way], "ms")
    record.add(model, "threads", [threads], "")
    for way in FORMS:
        size = programs[way].path.stat().st_size / 2**20
        record.add(f"{model}/{way}", "program_mib", [size], "MiB")
        peaks = [each.peak_rss_mib for each in found[way]]
        record.add(f"{model}/{way}", "peak_rss_mib", peaks, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lower", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("models", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.lower:
        way, model, path = arguments.lower
        lower_one(way, model, Path(path))
        return
    record = Recorder("serving")
    for model in arguments.models or MODELS:
        compare(record, model, arguments.threads)
    if not arguments.models:
        record.close()


if __name__ == "__main__":
    main()
