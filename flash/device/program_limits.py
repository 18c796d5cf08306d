"""Lengths for which a program was exported, as the file itself states them."""

from dataclasses import dataclass
from pathlib import Path

from flash.device.runner import load_program

_MARK = b"ET12"
"""Identifier of a program's file, after its first four bytes."""


@dataclass(frozen=True)
class ProgramLimits:
    """Lengths that a program of `flash export` states in its constant methods.

    Settings say what the next export shall have; a file keeps those that it was made with.

    Attributes:
        chunk: Most tokens of one call.
        context: Positions of its caches, for prompt and answer together [tokens].
    """

    chunk: int
    context: int

    @classmethod
    def find(cls, path: Path) -> "ProgramLimits | None":
        """Read the limits; None for blocks, stock baselines, and files that cannot be loaded."""
        if not path.is_file():
            return None
        # ExecuTorch prints the mark of a file that is no program, and ends the process if that is
        # not UTF-8.
        with path.open("rb") as file:
            if file.read(8)[4:] != _MARK:
                return None
        try:
            program = load_program(str(path))
        except RuntimeError:
            return None  # the device that runs it says what is wrong
        methods = {program.get_method_name(i) for i in range(program.num_methods())}
        if "flash_arch" not in methods:
            return None
        names = ("get_max_seq_len", "get_max_context_len")
        chunk, context = (program.load_method(name).call(())[0] for name in names)
        return cls(chunk, context)
