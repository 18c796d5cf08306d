"""SmolLM2-135M with fewer tokens: size, speed and quality of what writes the same English text.

Vocabularies of 16,384 and 8,192 tokens are cut out of 49,152 by the handbooks, manuals and essays
that `scripts/fetch_texts.py` fetches (`make smollm2` has model and texts). Cases are their sizes.
`bytes_per_token` and `bits_per_byte` are of held-out documents: of the backbone with the rows that
stay, and after TOKENS tokens of distillation (`/trained`). `size_mib` is that of the program.
`prefill_ms_per_kib` is the time to first token of a prompt of PROMPT_BYTES bytes, by its length,
and `decode_ms_per_kib` the time of the steps that write as much; `decode_ms` is one step. Programs
are timed on one thread, in turns; `prefill_speedup` and `decode_speedup` compare the times of the
same text with those of the whole vocabulary, turn by turn.

Trainings resume (runs/vocabulary).
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

from record import SMOKE, Recorder, output

import conf
from flash.data.settings import DataKind, DataSettings
from flash.device.host import HostDevice
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.lowering.lower import lower, write
from flash.lowering.settings import LoweringSettings
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.run import train
from flash.training.settings import Precision, RecipeSettings, TrainerSettings, TrainSettings
from flash.training.validation import validate
from flash.workspace import Workspace

SIZES = [2048, 1024] if SMOKE else [49152, 16384, 8192]
PROMPT_BYTES, CONTEXT, TURNS = (64, 32, 1) if SMOKE else (4096, 512, 3)
TOKENS = 131_072
KIB = 1024
FOLDER = output(conf.ROOT / "runs" / "vocabulary")
SMOLLM2 = BackboneSettings(name="smollm2_135m", weights=str(conf.ROOT / "runs" / "smollm2_135m"))
BACKBONE = conf.TINY if SMOKE else SMOLLM2
RECIPE = conf.short(
    dataclasses.replace(
        conf.group("recipe/distill", RecipeSettings), tokens=TOKENS, lr=2e-4, kd_top_k=64
    )
)


def text() -> DataSettings:
    """Return the English texts, each document in a file of its own."""
    if SMOKE:
        return conf.stdlib()
    folder = FOLDER / "text"
    for source in ("handbooks", "manuals", "essays"):
        lines = (conf.ROOT / "runs" / "texts" / f"{source}.jsonl").read_text("utf-8").splitlines()
        for i, line in enumerate(lines):
            path = folder / f"{source}_{i:04d}.txt"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.loads(line)["text"], "utf-8")
    return DataSettings(
        name="english",
        kind=DataKind.folder,
        path=str(folder),
        pattern="*.txt",
        validation_percent=5,
        validation_sequences=64,
        seq_len=512,
    )


def trained_bits(data: DataSettings, size: int) -> float:
    """Distil a vocabulary's backbone from itself on the text; return its bits per byte."""
    result = train(
        TrainSettings(
            backbone=BACKBONE,
            data=data,
            recipe=RECIPE,
            trainer=TrainerSettings(),
            logger=LoggerSettings(name="none", kind=LoggerKind.none),
            arch={"vocab_size": size},
            name=f"v{size}",
            runs=str(FOLDER),
        )
    )
    return result.after.bits_per_byte


def program(size: int) -> Path:
    """Write the program of a vocabulary, with random weights."""
    path = FOLDER / f"v{size}.pte"
    if not path.is_file():
        spec = Backbone.open(BACKBONE).spec.replace(vocab_size=size)
        write(path, lower(Decoder(spec), lowering()))
    return path


def lowering() -> LoweringSettings:
    """Return the form of the programs, with room for the longest prompt."""
    return LoweringSettings(max_context=max(PROMPT_BYTES // 2, CONTEXT + 32))


def times_ms(size: int, prompt: int) -> tuple[float, float]:
    """Time a prompt and a decode step in a fresh process [ms]."""
    settings = DeviceSettings(
        processes=1,
        lowering=lowering(),
        workload=Workload(prompts=[prompt], contexts=[CONTEXT]),
    )
    chosen = Program(name=str(size), path=program(size), vocab_size=size)
    [measured] = HostDevice(settings).measure([chosen], settings.workload)
    prefill, decode = (measured.latencies[point.name].ms for point in settings.workload.points)
    return prefill, decode


def main() -> None:
    record, data = Recorder("vocabulary"), text()
    workspace = Workspace(runs=Runs(FOLDER), backbone=Backbone.open(BACKBONE), data_settings=data)
    lengths = {}
    for size in SIZES:
        cut = workspace.for_vocabulary(size)
        lengths[size] = cut.data.bytes_per_token
        before = validate(cut.backbone.load(), cut.data, Precision.fp32)
        record.add(str(size), "bytes_per_token", [lengths[size]], "bytes")
        record.add(str(size), "bits_per_byte", [before.bits_per_byte], "bits")
        record.add(f"{size}/trained", "bits_per_byte", [trained_bits(data, size)], "bits")
        record.add(str(size), "size_mib", [program(size).stat().st_size / 2**20], "MiB")
    turns = [
        {size: times_ms(size, round(PROMPT_BYTES / lengths[size])) for size in SIZES}
        for _ in range(TURNS)
    ]
    for size in SIZES:
        add = partial(record.add, str(size))
        prefill = [turn[size][0] / (PROMPT_BYTES / KIB) for turn in turns]
        steps = [turn[size][1] for turn in turns]
        decode = [step * KIB / lengths[size] for step in steps]
        whole = [turn[SIZES[0]] for turn in turns]
        add("prefill_ms_per_kib", prefill, "ms")
        add("decode_ms", steps, "ms")
        add("decode_ms_per_kib", decode, "ms")
        pairs = list(zip(whole, turns, strict=True))
        longer = lengths[size] / lengths[SIZES[0]]
        add("prefill_speedup", [theirs[0] / turn[size][0] for theirs, turn in pairs], "ratio")
        add("decode_speedup", [longer * t[1] / turn[size][1] for t, turn in pairs], "ratio")
    record.close()


if __name__ == "__main__":
    main()
