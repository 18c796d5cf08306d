"""Losses by rounding to 8da4w: nearest, mse and gptq, rotated or not, with 4- and 8-bit embeddings.

- `perplexity_increase_pct` with `perplexity_se_pct`, `kl` and `agreement` compare the rounded
  decoder with the float one on held-out text, as the gate of an export does.
- The case `float/rotate` is the rotation alone, `.../g128` are groups of 128 weights.
- The cases `qat/...` are after quantization-aware training of 65,536 tokens (recipe=qat), rounded
  as their export is.

    python benchmarks/rounding.py [smollm2=FOLDER] [qat]

The tiny backbone is always rounded, with the standard library as text; SmolLM2-135M-Instruct if its
folder is given (`scripts/fetch_smollm2.sh FOLDER`), with the help texts of Python as text. `qat`
also trains.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from record import SMOKE, Recorder, output
from torch import Tensor

import conf
from flash.data.settings import DataKind, DataSettings
from flash.lowering.rounding_check import RoundingCheck, check_rounding
from flash.lowering.settings import GateSettings
from flash.model.backbone import Backbone
from flash.model.checkpoint import load
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.rounding.decoder import round_decoder, round_embedding, turn_decoder
from flash.rounding.settings import Rounding, WeightFormat
from flash.tracking.settings import LoggerKind, LoggerSettings
from flash.training.run import train
from flash.training.settings import Precision, RecipeSettings, TrainerSettings, TrainSettings
from flash.workspace import Workspace

QAT_TOKENS = 65536
HELD_OUT, CALIBRATION = (512, 1024) if SMOKE else (4096, 8192)
WAYS = [(rotate, method) for rotate in (False, True) for method in Rounding]


def settings_of(name: str, folder: Path, texts: Path) -> tuple[BackboneSettings, DataSettings]:
    """Return a backbone and its text."""
    if name == "tiny":
        return conf.TINY, conf.stdlib()
    for topic, text in topics.items():
        (texts / f"{topic}.txt").write_text(text, "utf-8")
    data = DataSettings(
        name="topics",
        kind=DataKind.folder,
        path=str(texts),
        pattern="*.txt",
        validation_percent=30,
        validation_sequences=HELD_OUT // 512,
    )
    return BackboneSettings(name=name, weights=str(folder)), data


class Rounded:
    """One backbone, its text, and the recorder of its losses."""

    def __init__(
        self, record: Recorder, name: str, backbone: BackboneSettings, data: DataSettings
    ) -> None:
        self.record, self.name, self.backbone, self.data = record, name, backbone, data
        self.runs = output(conf.ROOT / "runs" / "rounding")
        self.workspace = Workspace(
            runs=Runs(self.runs),
            backbone=Backbone.open(backbone),
            data_settings=data,
            batch_size=4,
        )
        validation = self.workspace.data.validation_set
        count = max(1, HELD_OUT // data.seq_len)
        self.texts: Sequence[Tensor] = [validation[i].tokens for i in range(count)]
        self.model = self.workspace.backbone.load().eval()

    def calibration(self, tokens: int) -> Tensor:
        return torch.cat(list(self.workspace.data.calibration_batches(tokens)))

    def add(self, case: str, rounded: Decoder) -> RoundingCheck:
        """Compare a rounded decoder with the float backbone."""
        check = check_rounding(self.model, rounded, self.texts, GateSettings())
        change, case = check.change, f"{self.name}/{case}"
        self.record.add(case, "perplexity_increase_pct", [change.perplexity_pct], "%")
        self.record.add(case, "perplexity_se_pct", [change.perplexity_se_pct], "%")
        self.record.add(case, "kl", [check.kl], "nats")
        self.record.add(case, "agreement", [check.agreement], "share")
        return check

    def compare(self, calibration: Tensor) -> None:
        """Round in all ways."""
        self.add("float/rotate", turn_decoder(self.model))
        for rotate, method in WAYS:
            rounded = round_decoder(
                self.model, WeightFormat(), method, rotate=rotate, calibration=calibration
            )
            case = f"{'rotate+' if rotate else ''}{method.value}"
            self.add(f"{case}/embedding_4", rounded)
            wide = WeightFormat(embedding_bits=8)
            mse = method is not Rounding.nearest
            rounded.model.embed_tokens = round_embedding(self.model, wide, mse=mse, rotate=rotate)
            self.add(f"{case}/embedding_8", rounded)
        if self.model.spec.model_dim % 128 == 0 and self.model.spec.ffn_dim % 128 == 0:
            groups = WeightFormat(group_size=128)
            rounded = round_decoder(
                self.model, groups, Rounding.gptq, rotate=True, calibration=calibration
            )
            self.add("rotate+gptq/g128", rounded)

    def train(self, calibration: Tensor) -> None:
        """Train for the rounding, and round as an export does."""
        found = conf.group("recipe/qat", RecipeSettings)
        recipe = conf.short(dataclasses.replace(found, tokens=QAT_TOKENS, batch_size=4))
        name = f"{self.name}-qat"
        train(
            TrainSettings(
                backbone=self.backbone,
                recipe=recipe,
                data=self.data,
                trainer=TrainerSettings(precision=Precision.bf16),
                logger=LoggerSettings(name="none", kind=LoggerKind.none),
                name=name,
                runs=str(self.runs),
            )
        )
        trained = load(Runs(self.runs).model(name) / "checkpoint")
        rounded = round_decoder(
            trained, recipe.qat_format, Rounding.gptq, rotate=True, calibration=calibration
        )
        self.add("qat/embedding_4", rounded)


def main(arguments: list[str]) -> None:
    """Run the parts that the arguments ask for."""
    folders = [Path(a.partition("=")[2]) for a in arguments if a.startswith("smollm2=")]
    record = Recorder("rounding")
    with tempfile.TemporaryDirectory() as texts:
        for name, folder in [("tiny", Path()), *(("smollm2", folder) for folder in folders)]:
            backbone, data = settings_of(name, folder, Path(texts))
            rounded = Rounded(record, name, backbone, data)
            calibration = rounded.calibration(CALIBRATION)
            rounded.compare(calibration)
            if "qat" in arguments:
                rounded.train(calibration)
    if folders and "qat" in arguments:
        record.close()


if __name__ == "__main__":
    main(["qat"] if SMOKE else sys.argv[1:])
