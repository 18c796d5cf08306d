"""The pretrained model that candidates are cut out of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.errors import InputError
from flash.model.checkpoint import load, open_weights, read_spec
from flash.model.decoder import Decoder


@dataclass(kw_only=True)
class BackboneSettings:
    """Config group `backbone`."""

    name: str
    weights: str | None = None
    """Hugging Face folder (config.json, model.safetensors, tokenizer.json); null: random."""
    arch: dict[str, Any] | None = None
    """Architecture when there are no weights to read it from."""


@dataclass(frozen=True)
class Backbone:
    """A backbone that was found and whose config was read; its weights are loaded on demand.

    Attributes:
        name: Name of the setting.
        spec: Its architecture.
        folder: Where its weights are; None when they are random.
    """

    name: str
    spec: ArchSpec
    folder: Path | None

    @classmethod
    def open(cls, settings: BackboneSettings) -> "Backbone":
        """Check the settings and the files' headers, without loading weights.

        Raises:
            InputError: Neither weights nor arch, or a folder that cannot be used.
        """
        if settings.weights is None:
            if settings.arch is None:
                raise InputError(
                    f"backbone.weights=null: expected a folder or backbone.arch for "
                    f"backbone={settings.name}; set one"
                )
            return cls(settings.name, ArchSpec.from_dict(settings.arch), None)
        folder = Path(settings.weights)
        if not folder.is_dir():
            raise InputError(
                f"backbone.weights={settings.weights}: expected a Hugging Face folder, found none"
            )
        spec = read_spec(folder)
        with open_weights(folder):
            return cls(settings.name, spec, folder)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json beside the weights, if there is one."""
        path = self.folder / "tokenizer.json" if self.folder else None
        return path if path is not None and path.is_file() else None

    def load(self) -> Decoder:
        """The backbone in float32.

        Raises:
            InputError: It has no weights, or they are damaged.
        """
        if self.folder is None:
            raise InputError(
                f"backbone.weights=null: expected a folder of pretrained weights for "
                f"backbone={self.name}; this needs them"
            )
        return load(self.folder)
