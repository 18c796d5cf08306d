"""Outcome of a job: its state, and one line for the table of its sweep.

Every job of a sweep is a process of its own. Its command notes each result in that process with
`note`; `noted` sums them up when the job ends.
"""

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from flash.records import find_json, write_json


class State(Enum):
    """State of a job."""

    done = "done"
    already_done = "already done"
    failed = "failed"
    stopped = "stopped"
    not_started = "not started"
    submitted = "submitted"


@dataclass(frozen=True)
class Outcome:
    """Outcome of one job.

    Attributes:
        state: State of the job.
        line: Its result, or the error of a failed one.
        code: Exit code of a failed job; 2 for bad input, as for the command alone.
    """

    state: State
    line: str = ""
    code: int = 0

    def write(self, path: Path) -> None:
        """Write the outcome as JSON, for the process of the sweep."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Outcome | None":
        """Read the outcome of a job; None if it ended without one, as a killed process does."""
        return find_json(path, cls, "run the job again")


_notes: list[Outcome] = []


def note(line: str, *, again: bool = False) -> None:
    """Note a result of this process's job.

    Args:
        line: The result in one line, such as `held-out loss 2.370 -> 2.140`.
        again: True for a result that an earlier run of the same job has finished.
    """
    _notes.append(Outcome(State.already_done if again else State.done, line))


def noted() -> Outcome:
    """Return the outcome of a job that has ended well: its last result, old if all are."""
    old = bool(_notes) and all(each.state is State.already_done for each in _notes)
    line = _notes[-1].line if _notes else ""
    return Outcome(State.already_done if old else State.done, line)
