"""Artifacts: the files that commands read and write, with the digests by which they are found.

The name, the type and the content of an artifact decide its version on the server. Both the command
that writes a file and the one that reads it build the artifact from the file itself, so they agree
on the version without asking a server.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from flash.paths import name_of_model
from flash.records import digest, file_digest

_PARTS = re.compile(r".*\.(jinja|json|model|safetensors)|(merges|vocab)\.txt")
"""Names of the files of a Hugging Face folder that decide what the model does."""
_LONGEST_TITLE = 128
"""Most characters of an artifact's name in W&B."""


class ArtifactKind(Enum):
    """Kinds of artifacts; the type of an artifact in W&B."""

    backbone = "backbone"
    importance = "importance"
    arch = "arch"
    checkpoint = "checkpoint"
    executorch = "pte"
    hf = "hf"
    gguf = "gguf"


@dataclass(frozen=True)
class Artifact:
    """File or folder that a command reads or writes.

    Attributes:
        kind: Kind of the content.
        name: Name of the backbone, architecture or result.
        path: A file, or a Hugging Face folder.
        about: Further facts for its metadata, as plain JSON values.
    """

    kind: ArtifactKind
    name: str
    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name in W&B, which takes letters, digits and `_ . -` only."""
        full = f"{self.kind.value}-{self.name}"
        title = re.sub(r"[^A-Za-z0-9_.-]", "-", full)
        if len(title) > _LONGEST_TITLE:
            end = digest(full, 8)
            title = f"{title[: _LONGEST_TITLE - len(end) - 1]}-{end}"
        return title

    @property
    def files(self) -> list[Path]:
        """Files of the content: the file itself, or config, tokenizer and weights of a folder."""
        if not self.path.is_dir():
            return [self.path]
        found = sorted(self.path.iterdir())
        return [path for path in found if _PARTS.fullmatch(path.name) and path.is_file()]

    def metadata(self) -> dict[str, Any]:
        """Compute the metadata: `about`, and the SHA-256 of each file's content."""
        return {**self.about, "sha256": {path.name: file_digest(path) for path in self.files}}


def weights_artifact(folder: Path, backbone: str, backbone_folder: Path | None) -> Artifact:
    """Describe a folder of weights: the backbone, or a checkpoint by the name of its result."""
    if folder == backbone_folder:
        return Artifact(ArtifactKind.backbone, backbone, folder)
    return Artifact(ArtifactKind.checkpoint, name_of_model(folder), folder)
