"""Subjects of measurements, and a cache of their lowered programs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flash.arch import ArchSpec
from flash.device.measurement import Program
from flash.interop.baselines import StockModel
from flash.interop.export_llm import lower_stock
from flash.latency.store import SubjectKind
from flash.lowering.blocks import Block, lower_block
from flash.lowering.lower import lower
from flash.lowering.settings import LoweringSettings
from flash.model.decoder import Decoder
from flash.records import digest, read_json, remove_leftovers, replacing, write_json

LOWERING_VERSION = 5
"""Version of the lowered programs. Raise it when flash.lowering writes other programs for the same
spec and settings: programs in the cache and latencies in the store are then not used any more."""

RUNTIME = f"executorch {version('executorch')}"
"""Package that wrote a program; the runtime of a device is part of the device's identity."""

Shape = ArchSpec | StockModel
"""Whole model without weights: an architecture of flash, or a stock baseline of `export_llm`."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Model or block to lower and measure; exactly one attribute is not None.

    Attributes:
        spec: Architecture of a whole model.
        block: Part of a model, such as one attention layer.
        stock: Stock baseline, a whole model that ExecuTorch's `export_llm` lowers.
    """

    spec: ArchSpec | None = None
    block: Block | None = None
    stock: StockModel | None = None

    @classmethod
    def of(cls, shape: Shape) -> "Subject":
        """Make the subject of a whole model; architectures with the same program become equal."""
        if isinstance(shape, StockModel):
            return cls(stock=shape)
        return cls(spec=shape.as_program())

    @property
    def kind(self) -> SubjectKind:
        """Kind of the subject, as in the store."""
        if self.block is not None:
            return SubjectKind.block
        return SubjectKind.model if self.stock is None else SubjectKind.stock

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, which are equal for subjects with the same program."""
        if self.block is not None:
            return {"kind": self.block.kind.value, "spec": self.block.spec.to_dict()}
        return self._shape.to_dict()

    def lower(self, lowering: LoweringSettings) -> bytes:
        """Lower a model or block with random weights, since weights do not change its latency."""
        if self.block is not None:
            return lower_block(self.block, lowering)
        assert self.spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lower(Decoder(self.spec), lowering)

    def write(self, path: Path, lowering: LoweringSettings) -> None:
        """Lower the subject and write its program to `path`.

        Raises:
            CheckFailed: ExecuTorch's `export_llm` failed.
        """
        if self.stock is not None:
            lower_stock(self.stock, lowering, path)
        else:
            path.write_bytes(self.lower(lowering))

    def program(self, path: Path, flush_mib: int = 0) -> Program:
        """Describe the program for the device; `flush_mib` [MiB] applies to blocks only."""
        name = str(self)
        if self.block is None:
            return Program(name=name, path=path, vocab_size=self._shape.vocab_size)
        spec = self.block.spec
        if self.block.takes_tokens:
            return Program(name=name, path=path, vocab_size=spec.vocab_size, flush_mib=flush_mib)
        return Program(name=name, path=path, model_dim=spec.model_dim, flush_mib=flush_mib)

    def __str__(self) -> str:
        if self.block is not None:
            return str(self.block)
        if self.stock is not None:
            return self.stock.name
        assert self.spec is not None
        # Its text shows neither heads nor vocabulary, nor the place of each width.
        return f"{self.spec} {digest(self.spec.to_dict())[:4]}"

    @property
    def _shape(self) -> Shape:
        shape = self.spec or self.stock
        assert shape is not None
        return shape


def lowering_values(lowering: LoweringSettings) -> dict[str, Any]:
    """Return the settings that affect a program as JSON values, with `LOWERING_VERSION`."""
    return {"version": LOWERING_VERSION, **lowering.identity()}


def program_digest(subject: Subject, lowering: LoweringSettings) -> str:
    """Hash the subject, the settings and the package that affect a program's content."""
    decisive = [subject.kind.value, subject.to_dict(), lowering_values(lowering), RUNTIME]
    return digest(decisive, 24)


def cached_program(
    subject: Subject,
    lowering: LoweringSettings,
    folder: Path,
    on_lower: Callable[[Subject], None] = lambda subject: None,
) -> Path:
    """Return the path of the subject's program in `folder`, lowering it if it is missing.

    Args:
        subject: Subject to lower.
        lowering: Settings of the lowering.
        folder: Cache of programs; their names hash everything that affects them.
        on_lower: Called before a program is lowered, which takes seconds to minutes.
    """
    remove_leftovers(folder)
    path = folder / f"{subject.kind.value}-{program_digest(subject, lowering)}.pte"
    if not (path.exists() and _timing(path).exists()):
        on_lower(subject)
        with replacing(path) as temporary:
            started = time.perf_counter()
            subject.write(temporary, lowering)
            took = time.perf_counter() - started
            write_json(_timing(path), {"lower_s": round(took, 2)})
    return path


def recorded_lower_s(path: Path) -> float:
    """Read the time that the lowering of a cached program took [s].

    Raises:
        InputError: The JSON file next to the program is damaged.
    """
    return read_json(_timing(path), _Timing, "lower it again").lower_s


@dataclass(frozen=True)
class _Timing:
    lower_s: float


def _timing(path: Path) -> Path:
    return path.with_suffix(".json")
