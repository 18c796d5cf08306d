"""The folder that holds everything a team's runs produce, and what lies where in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Runs:
    """Layout of the `runs` folder.

    Attributes:
        root: Setting `runs`.
    """

    root: Path

    @property
    def tokens(self) -> Path:
        """Token streams and trained tokenizers."""
        return self.root / "tokens"

    @property
    def lowered(self) -> Path:
        """Lowered programs by content."""
        return self.root / "lowered"

    @property
    def measurements(self) -> Path:
        """The measurement store."""
        return self.root / "measurements.jsonl"

    def latency(self, device: str) -> Path:
        """What stage 1 found about a device."""
        return self.root / "latency" / device

    @property
    def found_arch(self) -> Path:
        """Config group `arch` of what searches found; it is on Hydra's search path."""
        return self.root / "conf" / "arch"

    @property
    def logs(self) -> Path:
        """Local files of W&B and other loggers."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report" / "index.html"

    def importance(self, backbone: str) -> Path:
        """Importance scores of a backbone."""
        return self.root / "importance" / f"{backbone}.safetensors"

    def teacher(self, key: str) -> Path:
        """What a teacher said about training sequences ahead."""
        return self.root / "teachers" / key

    def model(self, name: str) -> Path:
        """A training run: `checkpoints/`, the finished Hugging Face folder and `result.json`."""
        return self.root / "models" / name

    def study(self, name: str) -> Path:
        """A search: its database, `trials/` with checkpoints, `frontier.json`."""
        return self.root / "studies" / name

    def evaluation(self, name: str) -> Path:
        """Results of a model's benchmark suites."""
        return self.root / "evaluations" / name

    @property
    def shapes(self) -> Path:
        """Latencies of shapes with random weights, a folder a device."""
        return self.root / "shapes"

    def export(self, name: str) -> Path:
        """An exported model."""
        return self.root / "exports" / name
