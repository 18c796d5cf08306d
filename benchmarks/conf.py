"""Settings of the benchmarks, read from the configuration files of the product."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from record import SMOKE

from flash.arch import ArchSpec, SearchSpace, SpaceSettings, parse_pattern
from flash.data.settings import DataKind, DataSettings
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
from flash.training.settings import RecipeSettings

ROOT = Path(__file__).resolve().parent.parent
TINY = BackboneSettings(name="tiny", weights=str(ROOT / "backbones" / "tiny"))

Group = TypeVar("Group")


def group(name: str, schema: type[Group]) -> Group:
    """Read a file of a config group, such as `space/flash`, as settings."""
    values = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(settings, schema)
    return settings


def shape_of(backbone: str) -> ArchSpec:
    """Return the architecture that the file of a backbone holds."""
    text = (ROOT / "conf" / "backbone" / f"{backbone}.yaml").read_text("utf-8")
    return ArchSpec.from_dict(yaml.safe_load(text)["arch"])


def flash_backbone() -> ArchSpec:
    """Return the backbone of the paper."""
    return shape_of("mobilellm_pro_shallow")


def winner(name: str) -> ArchSpec:
    """Return a winner of the paper, such as `flash_650m`."""
    changes = yaml.safe_load((ROOT / "conf" / "arch" / f"{name}.yaml").read_text("utf-8"))
    del changes["defaults"]
    return ArchSpec.from_dict({**flash_backbone().to_dict(), **changes})


def space(name: str) -> SearchSpace:
    """Return the space `flash` or `tiny` of the corresponding backbone."""
    backbone = flash_backbone() if name == "flash" else Backbone.open(TINY).spec
    return SearchSpace(group(f"space/{name}", SpaceSettings), backbone)


def stdlib(**values: Any) -> DataSettings:
    """Return the sources of the standard library, in a smoke run those of the benchmarks."""
    data = dataclasses.replace(group("data/stdlib", DataSettings), **values)
    if SMOKE:
        folder = str(ROOT / "benchmarks")
        data = dataclasses.replace(
            data, kind=DataKind.folder, path=folder, validation_percent=20, validation_sequences=2
        )
    return data


def short(recipe: RecipeSettings) -> RecipeSettings:
    """Return the recipe, in a smoke run with few tokens to train and calibrate on."""
    if not SMOKE:
        return recipe
    few = min(recipe.tokens, 4096)
    return dataclasses.replace(
        recipe, tokens=few, calibration_tokens=1024, qat_calibration_tokens=1024
    )


def small_spec(spec: ArchSpec) -> ArchSpec:
    """Return the architecture with one layer, narrow, and with a small vocabulary."""
    return spec.replace(layer_types=parse_pattern("F"), model_dim=128, ffn_dim=128, vocab_size=512)


def host() -> DeviceSettings:
    """Return the settings of device=host, in a smoke run with measurements of a second."""
    device = group("device/host", DeviceSettings)
    return small_device(device) if SMOKE else device


def small_device(device: DeviceSettings) -> DeviceSettings:
    """Return the device with measurements of a second, in programs for short contexts."""
    return dataclasses.replace(
        device,
        processes=1,
        warmups=0,
        runs=1,
        lowering=dataclasses.replace(device.lowering, max_context=64, prefill_chunk=None),
        workload=Workload(prompts=[32], contexts=[32], decode_tokens=4),
    )
