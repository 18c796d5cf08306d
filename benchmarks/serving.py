"""What we ship against ExecuTorch's own export of the same shape: prefill and decode at 2k.

flash_350m and flash_650m with random weights, 8da4w in groups of 32, 4-bit embedding, float cache
(the faster of the stock exporter's two on x86), 2,048 tokens in calls of 1,024. Both programs are
loaded in each of several fresh processes and take turns; a process that was slow throughout is
left out. `prefill_speedup` and `decode_speedup` are stock over ours, process by process.

Programs are kept in runs/serving, so that a second run only measures.
`python benchmarks/serving.py [--threads N] [MODEL ...]`; without models it keeps the results.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from record import Recorder

import conf
from flash.device import DeviceSettings, HostDevice, Measurement, Program
from flash.lowering import lower, write
from flash.lowering.stock import lower_stock_arch
from flash.model import Decoder

MODELS = ("flash_350m", "flash_650m")
CONTEXT, CHUNK, DECODE = 2048, 1024, 16
FOLDER = Path("runs/serving")


def device(threads: int) -> HostDevice:
    return HostDevice(
        DeviceSettings(
            name="host",
            threads=threads,
            max_context=CONTEXT + 2 * DECODE,
            prefill_chunk=CHUNK,
            prompts=[CONTEXT],
            contexts=[CONTEXT],
            decode_tokens=DECODE,
            processes=3,
            warmups=1,
            runs=1,
            run_timeout_s=600.0,
        )
    )


def lower_one(way: str, model: str, path: Path) -> None:
    """Write one program; called in a process of its own, which returns its memory."""
    spec, settings = conf.winner(model), device(1).settings.lowering
    if way == "stock":
        lower_stock_arch(spec, settings, path)
    else:
        write(path, lower(Decoder(spec), settings))


def program(way: str, model: str) -> Program:
    path = FOLDER / f"{model}-{way}.pte"
    if not path.is_file():
        command = [sys.executable, __file__, "--lower", way, model, str(path)]
        subprocess.run(command, check=True)
    return Program(name=way, path=path, vocab_size=conf.winner(model).vocab_size)


def ratios(ours: Measurement, theirs: Measurement, point: str) -> list[float]:
    """Their time over ours in each process that was kept."""
    pairs = zip(ours.samples, theirs.samples, strict=True)
    return [_least(b[point]) / _least(a[point]) for a, b in pairs if a["accepted"]]


def _least(samples: list[dict]) -> float:
    """Milliseconds of the fastest run, or of the fastest step of all runs."""
    steps = [step for sample in samples for step in sample.get("steps_ms", ())]
    return min(steps) if steps else 1e3 * min(sample["wall_s"] for sample in samples)


def compare(record: Recorder, model: str, threads: int) -> None:
    host = device(threads)
    programs = [program(way, model) for way in ("ours", "stock")]
    ours, stock = host.measure(programs, host.settings.workload)
    for name, point in (("prefill", f"prefill_{CONTEXT}"), ("decode", f"decode_{CONTEXT}")):
        record.add(model, f"{name}_speedup", ratios(ours, stock, point), "ratio")
        for each in (ours, stock):
            record.add(f"{model}/{each.name}", f"{name}_ms", [each.latencies[point].ms], "ms")
    record.add(model, "rejected_processes", [ours.rejected], "")
    record.add(model, "threads", [threads], "")
    for each in programs:
        size = each.path.stat().st_size / 2**20
        record.add(f"{model}/{each.name}", "program_mib", [size], "MiB")


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
