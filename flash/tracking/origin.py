"""Origin of an architecture: the trial of a search that found it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.paths import Runs
from flash.tracking.artifacts import Artifact, ArtifactKind

_HEADER = re.compile(r"# Frontier of the search study (\S+): trial (\d+)\b")
"""First line of a file of a found architecture, as flash.search.frontier writes it."""


@dataclass(frozen=True)
class Origin:
    """Trial that an architecture comes from.

    Attributes:
        study: Name of the study.
        trial: Number of the trial in the study.
        arch: Name of the architecture, the stem of its file.
        path: File of the architecture.
    """

    study: str
    trial: int
    arch: str
    path: Path

    @property
    def facts(self) -> dict[str, Any]:
        """Study, trial and architecture as plain JSON values."""
        return {"study": self.study, "trial": self.trial, "arch": self.arch}

    @property
    def artifact(self) -> Artifact:
        """File of the architecture, which the search has written."""
        return Artifact(ArtifactKind.arch, self.arch, self.path, self.facts)


def find_origin(runs: Runs, name: str, spec: ArchSpec) -> Origin | None:
    """Find the trial that found an architecture; None if no search did.

    The file of the architecture decides, not the form of the name, as names of studies and results
    are free. Of several studies with the same architecture it is that whose file the name of the
    result begins with, else the latest.

    Args:
        runs: Folder of results.
        name: Name of a result, such as `tiny_12_a3f9-ffn_dim384`.
        spec: Architecture of the result.
    """

    def rank(origin: Origin) -> tuple[int, float]:
        named = len(origin.arch) if name.startswith(origin.arch) else 0
        return named, origin.path.stat().st_mtime

    return max(_origins(runs, spec), key=rank, default=None)


def _origins(runs: Runs, spec: ArchSpec) -> Iterator[Origin]:
    for path in sorted(runs.found_arch.glob("*.yaml")):
        text = path.read_text("utf-8", errors="replace")
        header = _HEADER.match(text)
        if header is not None and _spec_of(text) == spec:
            yield Origin(header[1], int(header[2]), path.stem, path)


def _spec_of(text: str) -> ArchSpec | None:
    """Return the architecture in a file; None if someone has edited it to something else."""
    try:
        return ArchSpec.from_dict(yaml.safe_load(text))
    except (InputError, yaml.YAMLError, TypeError, AttributeError):
        return None
