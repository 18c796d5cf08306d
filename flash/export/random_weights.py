"""`measure_shape`: the latency of a shape with random weights, our own or a stock baseline's."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash.arch import ArchSpec, count_parameters
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.measurement import Measurement, Program
from flash.device.settings import DeviceSettings
from flash.errors import InputError, require
from flash.files import write_text
from flash.interop.baselines import StockModel, stock_model
from flash.interop.export_llm import check_stock, lower_stock
from flash.latency.profiler import RUNTIME
from flash.latency.profiler import plain as lowering_plain
from flash.lowering.lower import lower, write
from flash.lowering.settings import AttentionForm, LoweringSettings
from flash.model.backbone import Backbone
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.paths import Runs, digest
from flash.training.run import arch_of, plain

log = logging.getLogger(__name__)

RANDOM = "random"
"""`model=random`: no weights are read and none are judged."""

Shape = ArchSpec | StockModel


@dataclass(frozen=True, kw_only=True)
class ShapeResult:
    """Latencies of one shape on one device; `runs/shapes/DEVICE/NAME.json`.

    Attributes:
        name: Name of the model.
        shape: `to_dict` of the ArchSpec or StockModel.
        stack: What lowered it: `flash`, or ExecuTorch's `export_llm`.
        parameters: Tied ones once.
        measurement: Latencies on the device.
        pte_bytes: Size of the program.
        lower_s: Seconds from shape to file; None if the file was there.
        device: Identity of the device.
        conditions: Hash of all that other shapes must share with this one to be compared.
        key: Hash of all that decides the result.
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

    @staticmethod
    def path(runs: Runs, settings: DeviceSettings, name: str) -> Path:
        """Where the result of that name is kept."""
        return _folder(runs, settings) / f"{name}.json"

    def write(self, path: Path) -> None:
        """Store as JSON, atomically."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "ShapeResult":
        """Inverse of `write`.

        Raises:
            InputError: The file is damaged.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            measurement = Measurement.from_dict(values["measurement"])
            return cls(**{**values, "measurement": measurement})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it to measure again") from error


def shape_of(
    arch: Mapping[str, Any], backbone: BackboneSettings, model: str | None = RANDOM
) -> Shape:
    """What `+arch` names: a stock baseline, or the backbone's architecture with changes.

    Raises:
        InputError: No such baseline, other keys or weights beside `stock`, or no such spec.
    """
    if "stock" not in arch:
        return arch_of(arch, Backbone.open(backbone))
    name = arch["stock"]
    for key in arch:
        require(key == "stock", f"arch.{key}", arch[key], f"no key beside arch.stock={name}")
    found = stock_model(name)
    require(model == RANDOM, "model", model, f"{RANDOM}: arch.stock={name} has no other weights")
    return found


def measure_shape(
    name: str, shape: Shape, settings: DeviceSettings, runs: Runs, *, seed: int = 0
) -> ShapeResult:
    """Lower `shape` with random weights and time it, or return the finished result of the same.

    Args:
        name: Names the files, and the row of `table6`.
        shape: What to measure.
        settings: Where and how; also what the program is lowered for.
        runs: Program and result are kept in its folder `shapes`.
        seed: Of the random weights.

    Raises:
        InputError: Settings that cannot be used with this shape, or a damaged result.
        CheckFailed: ExecuTorch's export failed.
        DeviceError: A process on the device died or took too long.
    """
    conditions = conditions_of(open_device(settings))
    settings = _for_shape(shape, settings)
    _check(shape, settings.lowering)
    device = open_device(settings)
    key = digest({"shape": shape.to_dict(), "conditions": conditions, "seed": seed})
    path = ShapeResult.path(runs, settings, name)
    if path.is_file():
        found = ShapeResult.read(path)
        if found.key == key:
            log.info("%s is finished: %s", name, path)
            return found
    program, lower_s = _program(name, shape, settings.lowering, runs, seed)
    subject = Program(name=name, path=program, vocab_size=shape.vocab_size)
    log.info("%s: measuring on %s", name, settings.name)
    stock = isinstance(shape, StockModel)
    result = ShapeResult(
        name=name,
        shape=shape.to_dict(),
        stack="export_llm" if stock else "flash",
        parameters=shape.parameters if stock else count_parameters(shape).total,
        measurement=device.measure([subject], settings.workload)[0],
        pte_bytes=program.stat().st_size,
        lower_s=lower_s,
        device=device.identity(),
        conditions=conditions,
        key=key,
    )
    result.write(path)
    return result


def shape_results(runs: Runs, settings: DeviceSettings) -> list[ShapeResult]:
    """All results that were measured with these settings on this device, by name.

    Raises:
        InputError: A file is damaged.
    """
    conditions = conditions_of(open_device(settings))
    found = map(ShapeResult.read, sorted(_folder(runs, settings).glob("*.json")))
    return [result for result in found if result.conditions == conditions]


def conditions_of(device: Device) -> str:
    """Hash of device, runtime and settings: what makes two latencies comparable."""
    return digest({"device": device.identity(), "settings": plain(device.settings)})


def _for_shape(shape: Shape, settings: DeviceSettings) -> DeviceSettings:
    """ExecuTorch's own export has one form of attention, and a default chunk that goes with it."""
    if isinstance(shape, StockModel):
        lowering = dataclasses.replace(settings.lowering, attention=AttentionForm.sdpa)
        return dataclasses.replace(settings, lowering=lowering)
    return settings


def _folder(runs: Runs, settings: DeviceSettings) -> Path:
    return runs.shapes / settings.name


def _check(shape: Shape, settings: LoweringSettings) -> None:
    if isinstance(shape, StockModel):
        check_stock(shape, settings)
    else:
        settings.check_fits(shape)


def _program(
    name: str, shape: Shape, settings: LoweringSettings, runs: Runs, seed: int
) -> tuple[Path, float | None]:
    """The program's file and the seconds that it took to make; None if it was there."""
    decisive = {
        "shape": shape.to_dict(),
        "lowering": lowering_plain(settings),
        "seed": seed,
        "runtime": RUNTIME,
    }
    path = runs.shapes / f"{name}-{digest(decisive)}.pte"
    if path.is_file():
        return path, None
    log.info("%s: lowering, minutes for a large model", name)
    started = time.perf_counter()
    if isinstance(shape, StockModel):
        lower_stock(shape, settings, path, seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            write(path, lower(Decoder(shape), settings))
    return path, time.perf_counter() - started
