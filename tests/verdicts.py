"""Verdicts on folders: ours against that of the stock library which reads them too."""

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """Result of reading a folder."""

    right = "right"
    """We read it, and it means the same to the stock library."""
    refused = "refused"
    """We refuse it in one line that names the key or file."""
    wrong = "wrong"
    """We take it for something else, fail in another way, or name no key."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one folder.

    Attributes:
        case: Name of the folder.
        outcome: The outcome.
        reason: Our error, or the difference from the stock library.
    """

    case: str
    outcome: Outcome
    reason: str = ""
