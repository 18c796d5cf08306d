"""Names of the architectures that a search finds."""

from flash.arch import ArchSpec
from flash.records import digest


def arch_name(study: str, number: int, spec: ArchSpec) -> str:
    """Return the name of the architecture of a trial, `<study>_<trial>_<hash>`."""
    return f"{study}_{number}_{digest(spec.to_dict(), 4)}"
