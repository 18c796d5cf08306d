"""Settings of the benchmarks, read from the configuration files of the product."""

from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf

from flash.arch import ArchSpec, SearchSpace, SpaceSettings
from flash.device.settings import DeviceSettings
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings

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


def host() -> DeviceSettings:
    """Return the settings of device=host."""
    return group("device/host", DeviceSettings)
