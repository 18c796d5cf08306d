"""A search, a trained winner and its export on a very small backbone, made once for all tests."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from flash.arch import Attention, Choices, FfnChoices, SpaceSettings
from flash.data.settings import DataKind, DataSettings
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.export.run import export
from flash.export.settings import ExportSettings
from flash.latency.settings import LatencySettings
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.search.run import run_search
from flash.search.settings import SearchJobSettings, SearchSettings
from flash.tracking.settings import LoggerSettings
from flash.training.run import train
from flash.training.settings import (
    Precision,
    RecipeSettings,
    Schedule,
    TrainerSettings,
    TrainSettings,
)

SPACE = SpaceSettings(
    name="test",
    num_layers=Choices(min=1, max=2),
    model_dim=Choices(min=32, max=64, step=32),
    ffn_dim=FfnChoices(min=64, max=128, step=64),
    kinds=[Attention.full_attention, Attention.skip_attention],
    max_efficient_run=1,
)
DEVICE = DeviceSettings(
    name="host",
    processes=1,
    warmups=1,
    runs=2,
    lowering=LoweringSettings(max_context=64),
    workload=Workload(prompts=[32], contexts=[32], decode_tokens=4),
)
LATENCY = LatencySettings(grid_widths=2, grid_ffn=2, calibration_models=2, precision_pct=1000.0)
RECIPE = RecipeSettings(
    name="t", tokens=512, batch_size=4, lr=3e-3, calibration_tokens=256, schedule=Schedule.wsd
)
TRAINER = TrainerSettings(precision=Precision.fp32)
LOGGER = LoggerSettings(name="wandb", offline=True)
# With random weights, quantization to 4 bits changes most likeliest tokens; only the limits of the
# other stages stay tight.
GATE = GateSettings(prefill_tokens=8, decode_tokens=4, min_agreement_quantized=0.0)


def with_lowering(**lowering) -> DeviceSettings:
    """Return `DEVICE` with other settings of the lowering."""
    return dataclasses.replace(DEVICE, lowering=dataclasses.replace(DEVICE.lowering, **lowering))


@pytest.fixture(scope="session")
def common(corpus, backbone_folder, tmp_path_factory):
    data = DataSettings(
        name="test",
        kind=DataKind.folder,
        path=str(corpus),
        validation_percent=20,
        seq_len=32,
        validation_sequences=8,
    )
    return {
        "backbone": BackboneSettings(name="small", weights=str(backbone_folder)),
        "data": data,
        "trainer": TRAINER,
        "logger": LOGGER,
        "runs": str(tmp_path_factory.mktemp("work") / "runs"),
    }


def search_settings(common) -> SearchJobSettings:
    return SearchJobSettings(
        **common,
        space=SPACE,
        latency=LATENCY,
        device=DEVICE,
        recipe=RECIPE,
        search=SearchSettings(
            study="t",
            trials=5,
            batch=2,
            startup_trials=3,
            winners=1,
            max_loss_increase=6.0,
            max_cost_ratio=3.0,
        ),
    )


@pytest.fixture(scope="session")
def searched(common):
    return run_search(search_settings(common))


@pytest.fixture(scope="session")
def winner(common, searched):
    """Name and architecture of the trained and exported winner.

    The backbone is exported first.
    """
    name = (Runs(Path(common["runs"])).study("t") / "winners").read_text().strip()
    arch = yaml.safe_load((Runs(Path(common["runs"])).found_arch / f"{name}.yaml").read_text())
    recipe = dataclasses.replace(RECIPE, kd_weight=0.5)
    train(TrainSettings(**common, recipe=recipe, arch=arch, name=name))
    for each, what in ((None, {}), (name, arch)):
        export(export_settings(common, each or "small", what))
    return name, arch


def export_settings(common, name, arch, **changes) -> ExportSettings:
    values = {**common, "device": DEVICE, "gate": GATE, "arch": arch, "name": name}
    return ExportSettings(**{**values, "perplexity_tokens": 32, "new_tokens": 8, **changes})
