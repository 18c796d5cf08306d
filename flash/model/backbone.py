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
    """A backbone whose config has been read and whose weights are loaded on demand.

    Attributes:
        name: Name of the backbone.
        spec: Architecture of the backbone.
        folder: Checkpoint folder of the weights; None for random ones.
        hub_name: Name on the hub if the backbone comes from there; `fetch` then must be called
            before weights are read.
    """

    name: str
    spec: ArchSpec
    folder: Path | None
    hub_name: str | None = None

    @classmethod
    def open(cls, backbone: BackboneSettings) -> "Backbone":
        """Check settings and file headers, without loading or downloading weights.

        Raises:
            InputError: The settings have neither weights nor arch, or one that cannot be used.
        """
        weights = backbone.weights
        if weights is None:
            if backbone.arch is None:
                raise InputError(
                    f"backbone.weights=null: expected a folder or backbone.arch for "
                    f"backbone={backbone.name}; set one"
                )
            with under("backbone.arch"):
                spec = ArchSpec.from_dict(backbone.arch)
            return cls(backbone.name, spec, None)
        folder = Path(weights)
        if folder.is_dir():
            return cls(backbone.name, _checked(folder), folder)
        if not hub.is_name(weights):
            raise InputError(
                f"backbone.weights={weights}: expected a Hugging Face folder, or owner/model on "
                "the hub; found none"
            )
        folder = hub.fetch(weights, hub.SMALL_FILES, "backbone.weights")
        return cls(backbone.name, read_spec(folder), folder, weights)

    def fetch(self) -> None:
        """Download the weights of a backbone from the hub, if the cache lacks them.

        The download can be large, so call this after all other checks.

        Raises:
            InputError: The weights cannot be downloaded, or do not match config.json.
        """
        if self.hub_name is not None and self.folder is not None:
            patterns = [*hub.SMALL_FILES, *hub.WEIGHT_FILES]
            hub.fetch(self.hub_name, patterns, "backbone.weights")
            if _checked(self.folder) != self.spec:  # known from the weights alone
                raise InputError(
                    f"backbone.weights={self.hub_name}: expected a tied head, as config.json says, "
                    f"but the weights have their own; set backbone.weights={self.folder}"
                )

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json beside the weights; None if there is none."""
        path = self.folder / "tokenizer.json" if self.folder else None
        return path if path is not None and path.is_file() else None

    def load(self) -> Decoder:
        """The backbone as a float32 decoder.

        Raises:
            InputError: The backbone has no weights, or they are damaged.
        """
        if self.folder is None:
            raise InputError(
                f"backbone.weights=null: expected a folder of pretrained weights for "
                f"backbone={self.name}; this needs them"
            )
        return load(self.folder)


def _checked(folder: Path) -> ArchSpec:
    """The architecture of a checkpoint folder, after a check of its tensors' names and shapes.

    Raises:
        InputError: A file or a tensor is missing, damaged or of another shape.
    """
    weights = Weights(folder)
    weights.check(expected_shapes(weights.spec))
    return weights.spec
