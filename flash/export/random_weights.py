"""Latency of models with random weights: architectures of flash, and stock baselines."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import count_parameters
from flash.device.base import Device
from flash.device.measurement import Measurement
from flash.device.settings import DeviceSettings
from flash.errors import require
from flash.export.result import device_conditions
from flash.interop.baselines import StockModel, stock_model
from flash.interop.export_llm import check_stock
from flash.latency.profiler import Profiler
from flash.latency.programs import Shape, Subject, recorded_lower_s
from flash.latency.store import MeasurementStore
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.records import digest, read_json, write_json
from flash.workspace import arch_of

log = logging.getLogger(__name__)

RANDOM = "random"
"""Value of `model` to measure only the latency, with random weights."""


@dataclass(frozen=True, kw_only=True)
class ShapeResult:
    """Latencies of one shape on one device; stored as `runs/shapes/DEVICE/NAME.json`.

    Attributes:
        name: Name of the model.
        shape: `to_dict` of the ArchSpec or StockModel.
        stack: Lowering stack: `flash`, or ExecuTorch's `export_llm`.
        parameters: Number of parameters; tied ones count once.
        measurement: Latencies on the device.
        pte_bytes: Size of the program [bytes].
        lower_s: Time of the lowering [s]; None in results of older versions.
        device: Identity of the device.
        conditions: Hash of device and settings; only results with the same one are comparable.
        key: Hash of all inputs and settings that affect the result.
    """

    name: str
    shape: dict[str, Any]
    stack: str
    parameters: int
    measurement: Measurement
    pte_bytes: int
    lower_s: float | None
    device: dict[str, Any]
    conditions: str
    key: str

    def path(self, runs: Runs, settings: DeviceSettings) -> Path:
        """Return the path of the result; results of other settings have others."""
        return _path(runs, settings, self.name, self.key)

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        write_json(path, self)

    @classmethod
    def read(cls, path: Path) -> "ShapeResult":
        """Inverse of `write`.

        Raises:
            InputError: The file is damaged.
        """
        return read_json(path, cls, "measure again")


def shape_of(
    arch: Mapping[str, Any], backbone: BackboneSettings, model: str | None = RANDOM
) -> Shape:
    """Return the shape that `+arch` selects: a stock baseline, or a change of the backbone's.

    Args:
        arch: Setting `arch`: the key `stock` with the name of a baseline, or changes.
        backbone: Settings of the backbone.
        model: Setting `model`; a stock baseline needs `random`.

    Raises:
        InputError: An unknown baseline, other keys besides `stock`, weights for a baseline, or an
            illegal architecture.
    """
    if "stock" not in arch:
        return arch_of(arch, Backbone.open(backbone))
    name = arch["stock"]
    for key in arch:
        require(key == "stock", f"arch.{key}", arch[key], f"no key besides arch.stock={name}")
    found = stock_model(name)
    require(model == RANDOM, "model", model, f"{RANDOM}: arch.stock={name} has no other weights")
    return found


def measure_shape(name: str, shape: Shape, device: Device, runs: Runs) -> ShapeResult:
    """Lower `shape` with random weights and time it, or return the result of an earlier call.

    Latencies that the measurement store holds under the same conditions are not measured again.

    Args:
        name: Name of the result's file and of the row in `table6`.
        shape: Model to measure.
        device: Device to measure on; its settings define workload, lowering and protocol.
        runs: Layout of the folder of results.

    Raises:
        InputError: The settings do not fit this shape, or a stored result is damaged.
        CheckFailed: ExecuTorch's export failed.
        DeviceError: A process on the device died or took too long.
    """
    settings, conditions = (
        _for_shape(shape, device.settings),
        device_conditions(device, device.settings),
    )
    _check(shape, settings.lowering)
    # The seed of the weights, which is always the same, has been a part of the key.
    key = digest({"shape": shape.to_dict(), "conditions": conditions, "seed": 0})
    path = _path(runs, settings, name, key)
    if path.is_file():
        found = ShapeResult.read(path)
        if found.key == key:
            log.info("%s is finished: %s", name, path)
            return found
        device.check_unit(found.device, path)
    profiler = Profiler(
        device=device,
        workload=settings.workload,
        lowering=settings.lowering,
        store=MeasurementStore(runs.measurements),
        cache_dir=runs.lowered,
    )
    subject = Subject.of(shape)
    program = profiler.lowered(subject)
    log.info("%s: measuring on %s", name, settings.name)
    measurement = dataclasses.replace(profiler.measure_alone(subject), name=name)
    stock = isinstance(shape, StockModel)
    result = ShapeResult(
        name=name,
        shape=shape.to_dict(),
        stack="export_llm" if stock else "flash",
        parameters=shape.parameters if stock else count_parameters(shape).total,
        measurement=measurement,
        pte_bytes=program.stat().st_size,
        lower_s=recorded_lower_s(program),
        device=device.identity(),
        conditions=conditions,
        key=key,
    )
    result.write(path)
    return result


def shape_results(runs: Runs, device: Device) -> list[ShapeResult]:
    """Read all results that were measured on this device with its settings, by name.

    Raises:
        InputError: A file is damaged.
    """
    conditions = device_conditions(device, device.settings)
    found = map(ShapeResult.read, sorted(_folder(runs, device.settings).glob("*.json")))
    return [result for result in found if result.conditions == conditions]


def _for_shape(shape: Shape, settings: DeviceSettings) -> DeviceSettings:
    """Return the settings for a shape; `export_llm` has only the attention form `sdpa`."""
    if isinstance(shape, StockModel):
        lowering = dataclasses.replace(settings.lowering, attention=AttentionForm.sdpa)
        return dataclasses.replace(settings, lowering=lowering)
    return settings


def _path(runs: Runs, settings: DeviceSettings, name: str, key: str) -> Path:
    return _folder(runs, settings) / f"{name}.{key[:8]}.json"


def _folder(runs: Runs, settings: DeviceSettings) -> Path:
    return runs.shapes / settings.name


def _check(shape: Shape, settings: LoweringSettings) -> None:
    if isinstance(shape, StockModel):
        check_stock(shape, settings)
    else:
        settings.check_fits(shape)
