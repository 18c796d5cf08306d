"""Subjects of measurements and their programs, lowered once and kept in one folder."""

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
from flash.records import digest, read_json, replacing, write_json

LOWERING_VERSION = 3
"""To be raised when flash.lowering writes other programs for the same spec and settings, so that
old programs are not taken from the cache nor old latencies from the store."""

RUNTIME = f"executorch {version('executorch')}"
"""What wrote a program; a device's own runtime is part of its identity."""

Shape = ArchSpec | StockModel
"""A whole model without weights: one of ours, or a baseline of ExecuTorch's own export."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to lower and measure; exactly one attribute is given.

    Attributes:
        spec: A whole model.
        block: A part of one.
        stock: A whole model of ExecuTorch's own export.
    """

    spec: ArchSpec | None = None
    block: Block | None = None
    stock: StockModel | None = None

    @classmethod
    def of(cls, shape: Shape) -> "Subject":
        """A whole model, of ours as its program knows it."""
        if isinstance(shape, StockModel):
            return cls(stock=shape)
        return cls(spec=shape.as_program())

    @property
    def kind(self) -> SubjectKind:
        """What is measured, as the store names it."""
        if self.block is not None:
            return SubjectKind.block
        return SubjectKind.model if self.stock is None else SubjectKind.stock

    def to_dict(self) -> dict[str, Any]:
        """Plain values; equal for subjects that have the same program."""
        if self.block is not None:
            return {"kind": self.block.kind.value, "spec": self.block.spec.to_dict()}
        return self._shape.to_dict()

    def lower(self, lowering: LoweringSettings) -> bytes:
        """The program of one of ours, with random weights: they do not change its latency."""
        if self.block is not None:
            return lower_block(self.block, lowering)
        assert self.spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lower(Decoder(self.spec), lowering)

    def write(self, path: Path, lowering: LoweringSettings) -> None:
        """Lower to a file.

        Raises:
            CheckFailed: ExecuTorch's own export failed.
        """
        if self.stock is not None:
            lower_stock(self.stock, lowering, path)
        else:
            path.write_bytes(self.lower(lowering))

    def program(self, path: Path, flush_mib: int = 0) -> Program:
        """How the device is told of it; only blocks need their weights evicted."""
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
        return str(self.spec) if self.stock is None else self.stock.name

    @property
    def _shape(self) -> Shape:
        shape = self.spec or self.stock
        assert shape is not None
        return shape


def lowering_values(lowering: LoweringSettings) -> dict[str, Any]:
    """Identity of the settings as JSON values, with the version of the programs."""
    return {"version": LOWERING_VERSION, **lowering.identity()}


def program_digest(subject: Subject, lowering: LoweringSettings) -> str:
    """Content hash of a program: what it was lowered from and by."""
    decisive = [subject.kind.value, subject.to_dict(), lowering_values(lowering), RUNTIME]
    return digest(decisive, 24)


def cached_program(
    subject: Subject,
    lowering: LoweringSettings,
    folder: Path,
    on_lower: Callable[[Subject], None] = lambda subject: None,
) -> Path:
    """Path of the subject's program in `folder`, lowered unless it is there.

    Args:
        subject: What to lower.
        lowering: How.
        folder: Programs by content.
        on_lower: Called before one is lowered, which takes seconds to minutes.
    """
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
    """How long the program took to lower [s].

    Raises:
        InputError: The note beside it is damaged.
    """
    return read_json(_timing(path), lambda values: float(values["lower_s"]), "lower it again")


def _timing(path: Path) -> Path:
    return path.with_suffix(".json")
