"""Winners of `experiment=smollm2` against other ways to run the uncut model.

Programs are those that `make smollm2` has exported: `backbone` and the winners of the study, by
their names. `export_llm` is ExecuTorch's own export of the uncut shape (random weights, chunk
1,024), `llama.cpp` the uncut model in q4_0 (random weights, float32 cache, with flash attention or
without, whichever is faster). One thread, fp32 caches, fresh processes of all in turns.

`prefill_ms` and `decode_ms` at 512 and 2,048 tokens; `prefill_speedup` and `decode_speedup` of each
winner are the others' times divided by its own, turn by turn: `WINNER/OTHER/POINT`.
`prefill_prediction` and `decode_prediction` of own programs: what stage 1 of the search predicts on
this machine, divided by the time of each turn; what stage 1 lacks is measured first.

`python benchmarks/case_smollm2.py [WINNER ...]`; other files are kept in runs/case.
"""

import sys
from pathlib import Path

import yaml
from llama_timing import FP32, LlamaTiming, is_installed
from record import SMOKE, Recorder, made, output

import conf
from flash.arch import ArchSpec, SearchSpace, SpaceSettings
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.interop.baselines import to_stock_model
from flash.interop.export_llm import lower_stock
from flash.interop.gguf import write_gguf
from flash.interop.settings import GgufFormat
from flash.latency.fit import collect
from flash.latency.settings import LatencySettings
from flash.latency.store import MeasurementStore
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.decoder import Decoder
from flash.paths import Runs

PROMPTS, CONTEXTS, STEPS, TURNS = [2048, 512], [512, 2048], 16, 3
if SMOKE:
    PROMPTS, CONTEXTS, STEPS, TURNS = [32, 16], [16, 32], 2, 1
CONTEXT = max(PROMPTS) + 4 * STEPS
FOLDER = output(conf.ROOT / "runs" / "case")
RUNS = Runs(conf.ROOT / "runs")
STUDY, BACKBONE = "smollm2", "smollm2_135m"
STOCK, LLAMA = "export_llm", "llama.cpp"


def spec() -> ArchSpec:
    """Return the shape of the uncut model."""
    found = conf.shape_of(BACKBONE)
    return conf.small_spec(found) if SMOKE else found


def lowering(name: str) -> LoweringSettings:
    """Return the form of a program; prompts go through it in calls of the size that suits it."""
    attention = AttentionForm.sdpa if name == STOCK else AttentionForm.matmul
    return LoweringSettings(attention=attention, max_context=CONTEXT)


def make(path: Path) -> None:
    """Write a program or the GGUF file of the uncut shape, as the name of `path` says."""
    if path.stem == STOCK:
        lower_stock(to_stock_model(spec()), lowering(STOCK), path)
    elif path.suffix == ".gguf":
        write_gguf(path, Decoder(spec()), tokenizer=None, weight_format=GgufFormat.q4_0)
    else:
        write(path, lower(Decoder(spec()), lowering("backbone")))


def file(name: str) -> Path:
    """Return a file of the uncut shape."""
    return made(FOLDER / name, __file__, "--make")


def exported(name: str) -> Path:
    """Return the program that `flash export experiment=smollm2` has made of a model."""
    [found] = (RUNS.root / "exports").glob(f"{name}-{STUDY}*/model.pte")
    return found


def programs(winners: list[str]) -> dict[str, Path]:
    """Return the programs to time, by name."""
    if SMOKE:
        own = {"backbone": file("a.pte"), "winner": file("b.pte")}
    else:
        own = {"backbone": exported(BACKBONE)}
        own |= {name: exported(name) for name in winners}
    return {**own, STOCK: file(f"{STOCK}.pte")}


def predicted_ms(winners: list[str]) -> dict[str, dict[str, float]]:
    """Predict the times of the backbone and winners [ms], by name and point."""
    if SMOKE:
        return {}
    specs = {"backbone": spec().as_program()}
    for name in winners:
        text = (RUNS.found_arch / f"{name}.yaml").read_text("utf-8")
        specs[name] = ArchSpec.from_dict(yaml.safe_load(text)).as_program()
    settings = DeviceSettings(
        lowering=lowering("backbone"),
        workload=Workload(prompts=PROMPTS, contexts=CONTEXTS[:1]),
    )
    model = collect(
        space=SearchSpace(conf.group(f"space/{STUDY}", SpaceSettings), spec()),
        backbone=spec(),
        device=HostDevice(settings),
        workload=settings.workload,
        lowering=settings.lowering,
        settings=LatencySettings(),
        store=MeasurementStore(RUNS.measurements),
        cache_dir=RUNS.lowered,
        seed=0,
    )
    found = zip(specs, model.predict(list(specs.values())), strict=True)
    return {name: {point: each["mean_ms"] for point, each in t.items()} for name, t in found}


def times_ms(name: str, path: Path) -> dict[str, float]:
    """Time a program in a fresh process: the fastest run at each point [ms]."""
    settings = DeviceSettings(
        name="host",
        processes=1,
        warmups=1,
        runs=2,
        run_timeout_s=600.0,
        lowering=lowering(name),
        workload=Workload(prompts=PROMPTS, contexts=CONTEXTS, decode_tokens=STEPS),
    )
    program = Program(name=name, path=path, vocab_size=spec().vocab_size)
    [measured] = HostDevice(settings).measure([program], settings.workload)
    return {point: latency.ms for point, latency in measured.latencies.items()}


def main(winners: list[str]) -> None:
    chosen = programs(winners)
    own = [name for name in chosen if name not in ("backbone", STOCK)]
    llama = None
    if is_installed():
        llama = LlamaTiming(
            path=str(file("theirs.gguf")),
            vocab_size=spec().vocab_size,
            prompts=PROMPTS,
            contexts=CONTEXTS,
            steps=STEPS,
            max_context=CONTEXT,
            threads=1,
            cache=FP32,
        )
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(TURNS):
        for name, path in chosen.items():
            found.setdefault(name, []).append(times_ms(name, path))
        if llama is not None:
            times = {point: 1e3 * seconds for point, seconds in llama.best().items()}
            found.setdefault(LLAMA, []).append(times)
    record = Recorder("case_smollm2")
    for name, points in predicted_ms(own).items():
        for point, ms in points.items():
            phase, _, tokens = point.partition("_")
            ratios = [ms / turn[point] for turn in found[name]]
            record.add(f"{name}/{tokens}", f"{phase}_prediction", ratios, "ratio")
    for name, turns in found.items():
        for point in turns[0]:
            phase, _, tokens = point.partition("_")
            record.add(f"{name}/{tokens}", f"{phase}_ms", [turn[point] for turn in turns], "ms")
    for name in own:
        for other in (each for each in found if each not in own):
            for point in found[name][0]:
                phase, _, tokens = point.partition("_")
                pairs = zip(found[other], found[name], strict=True)
                ratios = [theirs[point] / ours[point] for theirs, ours in pairs]
                record.add(f"{name}/{other}/{tokens}", f"{phase}_speedup", ratios, "ratio")
    record.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]))
    else:
        winners = RUNS.study(STUDY) / "winners"
        found = winners.read_text("utf-8").strip().split(",") if winners.is_file() else []
        main(sys.argv[1:] or found)
