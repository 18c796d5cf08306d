"""The pretrained model that candidates are cut out of."""

from dataclasses import dataclass
from pathlib import Path

from flash.arch import ArchSpec
from flash.errors import InputError, under
from flash.model import hub
from flash.model.checkpoint import expected_shapes, load
from flash.model.decoder import Decoder
from flash.model.settings import BackboneSettings
from flash.model.weights import Weights, read_spec


@dataclass(frozen=True)
class Backbone:
    """A backbone that was found and whose config was read; its weights are loaded on demand.

    Attributes:
        name: Name of the setting.
        spec: Its architecture.
        folder: Where its weights are; None when they are random.
        hub_name: Its name on the hub if it comes from there: `fetch` before weights are read.
    """

    name: str
    spec: ArchSpec
    folder: Path | None
    hub_name: str | None = None

    @classmethod
    def open(cls, settings: BackboneSettings) -> "Backbone":
        """Check the settings and the files' headers, without loading (or downloading) weights.

        Raises:
            InputError: Neither weights nor arch, or a folder or model that cannot be used.
        """
        weights = settings.weights
        if weights is None:
            if settings.arch is None:
                raise InputError(
                    f"backbone.weights=null: expected a folder or backbone.arch for "
                    f"backbone={settings.name}; set one"
                )
            with under("backbone.arch"):
                spec = ArchSpec.from_dict(settings.arch)
            return cls(settings.name, spec, None)
        folder = Path(weights)
        if folder.is_dir():
            return cls(settings.name, _checked(folder), folder)
        if not hub.is_name(weights):
            raise InputError(
                f"backbone.weights={weights}: expected a Hugging Face folder, or owner/model on "
                "the hub; found none"
            )
        folder = hub.fetch(weights, hub.SMALL, "backbone.weights")
        return cls(settings.name, read_spec(folder), folder, weights)

    def fetch(self) -> None:
        """Have the weights on this machine: call it once all else is known to be right.

        Raises:
            InputError: They cannot be downloaded, or are not what config.json says.
        """
        if self.hub_name is not None and self.folder is not None:
            patterns = [*hub.SMALL, *hub.WEIGHTS]
            hub.fetch(self.hub_name, patterns, "backbone.weights")
            _checked(self.folder)

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


def _checked(folder: Path) -> ArchSpec:
    """The architecture of a folder whose files have the tensors that it needs."""
    weights = Weights(folder)
    weights.check(expected_shapes(weights.spec))
    return weights.spec
