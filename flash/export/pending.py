"""Parts of an unfinished export that are kept, so that a stopped one goes on from them."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from flash.errors import InputError
from flash.export.mixed import PartCost
from flash.latency.programs import LOWERING_VERSION
from flash.lowering.lower import write
from flash.records import convert, digest, file_digest, find_json, write_json


@dataclass(frozen=True, kw_only=True)
class PendingExport:
    """Finished parts of an export before it is published.

    Attributes:
        folder: Folder of the export.
        key: Key of the export, with the version of the lowering.
        eight_bit: Parts in 8 bits that `mixed` chose; None before the choice.
        costs: Costs of all parts, for that choice.
        gate: Report of the parity gate; empty before it has passed.
        lower_s: Time of the lowering [s].
        program_digest: Hash of the program.
    """

    folder: Path
    key: str
    eight_bit: list[str] | None = None
    costs: list[PartCost] = field(default_factory=list)
    gate: dict[str, Any] = field(default_factory=dict)
    lower_s: float = 0.0
    program_digest: str = ""

    @classmethod
    def open(cls, folder: Path, key: str) -> Self:
        """Read what an earlier start of the same export has left; damaged files count as none."""
        empty = cls(folder=folder, key=digest([key, LOWERING_VERSION]))

        def read(values: Any) -> Self:
            return convert(cls, {**convert(dict[str, Any], values), "folder": str(folder)})

        try:
            found = find_json(folder / ".pending.json", read, "export again")
        except InputError:
            return empty
        if found is None or found.key != empty.key:
            return empty
        program = empty.program
        if found.gate and not (program.is_file() and file_digest(program) == found.program_digest):
            return replace(found, gate={}, lower_s=0.0, program_digest="")
        return found

    @property
    def program(self) -> Path:
        """Path of the program until it is published."""
        return self.folder / ".model.pte"

    def with_choice(self, eight_bit: list[str], costs: list[PartCost]) -> Self:
        """Keep the choice of parts in 8 bits."""
        return self._kept(eight_bit=eight_bit, costs=costs)

    def with_program(self, data: bytes, gate: dict[str, Any], lower_s: float) -> Self:
        """Keep a program that passed the parity gate."""
        write(self.program, data)
        kept = file_digest(self.program)
        return self._kept(gate=gate, lower_s=lower_s, program_digest=kept)

    def publish(self) -> None:
        """Name the program; the former result goes, as one is never beside another program."""
        for name in ("export.json", "gate_failed.json", "mixed.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.program.replace(self.folder / "model.pte")
        write_json(self.folder / "gate.json", self.gate)
        if self.costs:
            parts = {"parts": [asdict(cost) for cost in self.costs], "eight_bit": self.eight_bit}
            write_json(self.folder / "mixed.json", parts)

    def discard(self) -> None:
        """Remove what is kept."""
        (self.folder / ".pending.json").unlink(missing_ok=True)
        self.program.unlink(missing_ok=True)

    def _kept(self, **changes: Any) -> Self:
        changed = replace(self, **changes)
        values = asdict(changed)
        del values["folder"]
        write_json(self.folder / ".pending.json", values)
        return changed
