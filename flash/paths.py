"""Layout of the folder `runs`, which holds the results of all commands."""

from dataclasses import dataclass
from pathlib import Path

from flash.errors import check_name


@dataclass(frozen=True)
class Runs:
    """Layout of the `runs` folder.

    Attributes:
        root: The folder, from the setting `runs`.
    """

    root: Path

    @property
    def tokens(self) -> Path:
        """Token streams and trained tokenizers."""
        return self.root / "tokens"

    @property
    def lowered(self) -> Path:
        """Cache of lowered programs."""
        return self.root / "lowered"

    @property
    def measurements(self) -> Path:
        """File of the measurement store."""
        return self.root / "measurements.jsonl"

    def latency(self, device: str) -> Path:
        """Return the folder of the latency predictor's accuracy on a device (stage 1)."""
        return self.root / "latency" / _checked(device, "device.name")

    @property
    def found_arch(self) -> Path:
        """Hydra's config group `arch` of architectures that searches found."""
        return self.root / "conf" / "arch"

    @property
    def logs(self) -> Path:
        """Local files of W&B and other loggers."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """File of the HTML report."""
        return self.root / "report" / "index.html"

    def importance(self, backbone: str) -> Path:
        """Return the file of a backbone's importance scores."""
        return self.root / "importance" / f"{backbone}.safetensors"

    def backbone(self, name: str) -> Path:
        """Return the folder of a backbone with a smaller vocabulary."""
        return self.root / "backbones" / name

    def teacher(self, key: str) -> Path:
        """Return the folder of precomputed teacher outputs on training sequences."""
        return self.root / "teachers" / key

    def model(self, name: str) -> Path:
        """Return the folder of a training run: checkpoints, Hugging Face folder, `result.json`."""
        return self.root / "models" / _checked(name)

    def study(self, name: str) -> Path:
        """Return the folder of a search: database, `trials/` with checkpoints, `frontier.json`."""
        return self.root / "studies" / _checked(name, "search.study")

    def evaluation(self, name: str) -> Path:
        """Return the folder of a model's benchmark results."""
        return self.root / "evaluations" / _checked(name)

    @property
    def shapes(self) -> Path:
        """Latencies of models with random weights, in one folder per device."""
        return self.root / "shapes"

    def export(self, name: str) -> Path:
        """Return the folder of an exported model."""
        return self.root / "exports" / _checked(name)


def name_of_model(path: Path | str) -> str:
    """Return the name of a checkpoint's folder, of a file, or of a model on the hub.

    The checkpoint of a training has the name of the training.
    """
    folder = Path(path)
    if folder.name in {"", "..", "checkpoint"}:  # may be relative to the working directory
        folder = folder.resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


def _checked(name: str, key: str = "name") -> str:
    """`name`, if it can be that of a folder.

    Raises:
        InputError: It cannot.
    """
    check_name(key, name)
    return name
