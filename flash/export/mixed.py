"""Mixed precision: the parts of a model whose weights get 8 bits, chosen under a limit.

Each part has a cost in loss in 4 and in 8 bits, bytes, and time in a decode step on the device. The
choice is exact: it saves the most loss of all choices within the limits, with costs that add up.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flash.arch import ArchSpec, Quantization, linear_parts
from flash.device.base import Device
from flash.device.settings import DeviceKind, DeviceSettings
from flash.device.workload import Phase
from flash.errors import InputError, shown
from flash.export.rounding import RoundingChoice
from flash.export.settings import MixedSettings
from flash.latency.profiler import flushed_mib
from flash.latency.programs import Subject, cached_program
from flash.lowering.blocks import Block, BlockKind
from flash.lowering.depth_profile import part_costs
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder
from flash.rounding.decoder import round_decoder
from flash.rounding.settings import Rounding
from flash.terminal import table

log = logging.getLogger(__name__)

ALL_EIGHT = ["*"]


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one part in 4 bits, and of 8 bits in their place."""

    name: str
    """Name of the part, as of `flash.arch.linear_parts`."""
    kl: float
    """Mean KL divergence from the float decoder with this part alone in 4 bits [nats]."""
    kl_eight: float
    """The same in 8 bits [nats]."""
    extra_bytes: int
    """Further bytes of weights in 8 bits."""
    extra_ms: float | None
    """Further time of a decode step in 8 bits [ms]; None if it was not measured."""

    @property
    def saved(self) -> float:
        """KL divergence that 8 bits save [nats]."""
        return self.kl - self.kl_eight


def cost_table(costs: Sequence[PartCost], chosen: Sequence[str]) -> str:
    """Lay out the costs of all parts, those that save most for their bytes first."""
    rows = [["part", "kl 4 bits", "kl 8 bits", "+ KiB", "+ ms", "chosen"]]
    for cost in sorted(costs, key=lambda cost: -cost.saved / cost.extra_bytes):
        ms = "" if cost.extra_ms is None else f"{cost.extra_ms:.3f}"
        picked = "8 bits" if cost.name in chosen else ""
        kib = f"{cost.extra_bytes / 2**10:.0f}"
        rows.append([cost.name, f"{cost.kl:.1e}", f"{cost.kl_eight:.1e}", kib, ms, picked])
    return table(rows)


def choose_parts(
    costs: Sequence[PartCost], room_bytes: float | None, room_ms: float | None
) -> list[str]:
    """Choose the parts that save the most KL divergence within the limits; the choice is exact.

    Args:
        costs: Costs of all parts.
        room_bytes: Most further bytes of weights; None for no limit.
        room_ms: Most further time of a decode step [ms]; None for no limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    limits: list[Any] = []
    if room_bytes is not None:
        extra: Any = [[cost.extra_bytes for cost in costs]]
        limits.append(LinearConstraint(extra, ub=room_bytes))
    if room_ms is not None:
        extra = [[cost.extra_ms or 0.0 for cost in costs]]
        limits.append(LinearConstraint(extra, ub=room_ms))
    saved = np.array([cost.saved for cost in costs])
    most: Any = (saved > 0).astype(float)
    found: Any = milp(
        -saved / max(saved.max(), 1e-30),
        constraints=limits,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, most),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return [cost.name for cost, take in zip(costs, found.x, strict=True) if take > 0.5]


def check_mixed(settings: MixedSettings, device: DeviceSettings, spec: ArchSpec) -> None:
    """See that the limits can be met.

    Raises:
        InputError: The weights exceed the limit in 4 bits already, parts are named as well, or the
            device cannot time parts.
    """
    if settings.off:
        return
    lowering = device.lowering
    if settings.max_decode_ms is not None and device.kind is DeviceKind.android:
        raise InputError(
            f"mixed.max_decode_ms={settings.max_decode_ms:g}: expected null for a phone, which "
            "times whole models only; give mixed.max_weight_mib"
        )
    if lowering.quantization is Quantization.fp32:
        raise InputError(
            "device.lowering.quantization=fp32: expected int8da4w with a limit of mixed; leave out "
            "one of them"
        )
    if lowering.eight_bit:
        raise InputError(
            f"device.lowering.eight_bit={shown(lowering.eight_bit)}: expected [] with a limit of "
            "mixed, which chooses the parts; leave out one of them"
        )
    least = lowering.weight_bytes(spec) / 2**20
    if settings.max_weight_mib is not None and settings.max_weight_mib < least:
        rounded_up = math.ceil(100 * least) / 100
        raise InputError(
            f"mixed.max_weight_mib={settings.max_weight_mib:g}: expected at least {rounded_up}, "
            "which the weights take with all parts in 4 bits"
        )


def mixed_lowering(
    model: Decoder,
    lowering: LoweringSettings,
    settings: MixedSettings,
    choice: RoundingChoice,
    calibration: Tensor,
    device: Device,
    programs: Path,
) -> tuple[list[str], list[PartCost]]:
    """Choose the parts in 8 bits; return their names, and the costs of all parts.

    Args:
        model: Decoder in float32.
        lowering: Settings with all parts in 4 bits.
        settings: Limits.
        choice: Rounding of the export.
        calibration: Token ids of training text `(n, s)`; costs are those of its first sequence.
        device: Device whose decode steps are timed.
        programs: Folder for lowered blocks and models.

    Raises:
        InputError: The decode step takes longer than its limit with all parts in 4 bits already.
        DeviceError: A process on the device died or took too long.
    """
    wide = replace(lowering, eight_bit=ALL_EIGHT)
    extra_ms, room_ms = dict.fromkeys(linear_parts(model.spec)), None
    if settings.max_decode_ms is not None:
        extra_ms, step = _decode_ms(model.spec, lowering, wide, device, programs)
        room_ms = settings.max_decode_ms - step
        if room_ms < 0:
            raise InputError(
                f"mixed.max_decode_ms={settings.max_decode_ms:g}: expected at least {step:.3g}, "
                "the decode step of the model with all parts in 4 bits, as measured on this device"
            )
    costs = []
    for each, method in ((lowering, choice.method), (wide, Rounding.nearest)):
        rounded = round_decoder(
            model, each.weight_format, method, rotate=choice.rotate, calibration=calibration
        )
        costs.append(part_costs(model, rounded, calibration[0], rotated=choice.rotate))
    spec = model.spec
    base = lowering.weight_bytes(spec)
    found = [
        PartCost(
            name=part,
            kl=costs[0][part],
            kl_eight=costs[1][part],
            extra_bytes=replace(lowering, eight_bit=[part]).weight_bytes(spec) - base,
            extra_ms=extra_ms[part],
        )
        for part in linear_parts(spec)
    ]
    limit = settings.max_weight_mib
    return choose_parts(found, None if limit is None else limit * 2**20 - base, room_ms), found


def _decode_ms(
    spec: ArchSpec, narrow: LoweringSettings, wide: LoweringSettings, device: Device, folder: Path
) -> tuple[dict[str, float], float]:
    """Further time of a decode step by part, and the step with all parts in 4 bits [ms].

    A part that is timed alone takes another time than within a model. The further times of parts
    are therefore scaled by one factor, with which they add up to that of the model with all parts
    in 8 bits. Equal parts are timed once, all in turns in the same processes.
    """
    blocks = {part: Block.of(_kind(part, spec), spec) for part in linear_parts(spec)}
    subjects = {part: Subject(block=block) for part, block in blocks.items()}
    whole = Subject.of(spec)
    asked = [
        (subject, bits) for bits in (4, 8) for subject in [*dict.fromkeys(subjects.values()), whole]
    ]
    flush_mib = flushed_mib(spec, narrow)
    programs = []
    for subject, bits in asked:
        path = cached_program(subject, narrow if bits == 4 else wide, folder)
        name = f"{subject}, {bits} bits"
        programs.append(replace(subject.program(path, flush_mib), name=name))
    workload = device.settings.workload
    measured = device.measure(programs, workload.only([workload.first(Phase.decode)]))
    ms = dict(zip(asked, (each.decode.ms for each in measured), strict=True))
    log.info("decode step: %.3g ms in 4 bits, %.3g ms in 8 bits", ms[whole, 4], ms[whole, 8])
    extra = {part: max(0.0, ms[each, 8] - ms[each, 4]) for part, each in subjects.items()}
    total = sum(extra.values())
    scale = max(0.0, ms[whole, 8] - ms[whole, 4]) / total if total else 0.0
    return {part: scale * value for part, value in extra.items()}, ms[whole, 4]


def _kind(part: str, spec: ArchSpec) -> BlockKind:
    if part == "lm_head":
        return BlockKind.ends
    _, layer, half = part.split(".")
    return BlockKind.ffn if half == "mlp" else BlockKind[spec.layer_types[int(layer)].value]
