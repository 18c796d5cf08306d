"""Names of the architectures that a search finds."""

from flash.arch import ArchSpec
from flash.records import digest


def arch_name(study: str, trial: int, spec: ArchSpec) -> str:
    """Return the name of an architecture that a search found, such as `tiny_12_a3f9`.

    The same trial of another study of this name, which was begun anew, has another hash.
    """
    return f"{study}_{trial}_{digest(spec.to_dict(), 4)}"
