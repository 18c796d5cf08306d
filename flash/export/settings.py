"""Settings of an export: the formats that it writes, and the root of `export.py`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from flash.data.settings import DataSettings
from flash.device.settings import DeviceSettings
from flash.errors import require
from flash.interop.settings import GgufFormat
from flash.lowering.settings import GateSettings
from flash.model.settings import BackboneSettings
from flash.training.settings import LoggerSettings, TrainerSettings


class ExportFormat(Enum):
    """What an export writes."""

    executorch = "executorch"
    """`model.pte`, which is also measured on the device."""
    hf = "hf"
    """`hf/`, a folder for stock transformers; a skipped layer is no faster there."""
    gguf = "gguf"
    """`model.gguf` for llama.cpp."""


@dataclass(kw_only=True)
class FormatSettings:
    """How formats other than the program are written and how closely they must agree."""

    gguf: GgufFormat = GgufFormat.q8_0
    """Weights of a GGUF file."""
    gguf_tokenizer: bool = True
    """Whether it holds the tokenizer; false is a file of token ids, for tokenizers that llama.cpp
    has no name for, as those that this project trains."""
    max_error_hf: float = 1e-4
    """A folder in stock transformers: largest difference of a logit over the largest logit."""
    max_kl_gguf: float | None = None
    """GGUF against the float model: mean KL [nats]; null takes what suits the weights."""
    min_agreement_gguf: float | None = None
    """GGUF: share of positions with the same likeliest token; null takes what suits the weights."""

    def __post_init__(self) -> None:
        require(self.max_error_hf > 0, "max_error_hf", self.max_error_hf, "above 0")
        kl, share = self.max_kl_gguf, self.min_agreement_gguf
        require(kl is None or kl > 0, "max_kl_gguf", kl, "a positive number or null")
        require(
            share is None or 0 <= share <= 1,
            "min_agreement_gguf",
            share,
            "a share from 0 to 1, or null",
        )


@dataclass(kw_only=True)
class ExportSettings:
    """Root of `export.py`."""

    backbone: BackboneSettings = MISSING
    device: DeviceSettings = MISSING
    data: DataSettings = MISSING
    trainer: TrainerSettings = MISSING
    logger: LoggerSettings = MISSING
    gate: GateSettings = field(default_factory=GateSettings)
    format: list[ExportFormat] = field(default_factory=lambda: [ExportFormat.executorch])
    """What to write, such as [executorch,hf,gguf]."""
    formats: FormatSettings = field(default_factory=FormatSettings)
    """How hf and gguf are written and proved."""
    arch: dict[str, Any] = field(default_factory=dict)
    """What to export, as for `train.py`; nothing is the backbone itself."""
    name: str | None = None
    """Name of the result; null takes the arch's."""
    model: str | None = None
    """Folder of trained weights; null takes what `train.py` wrote under the same name; `random`
    only measures the shape."""
    prompt: str = "def main("
    """What the exported program is asked to continue."""
    new_tokens: int = 48
    """Length of its answer [tokens]."""
    perplexity_tokens: int = 512
    """Held-out tokens that the program's own loss is computed on."""
    overwrite: bool = False
    """Whether an export of the same name but of other weights or settings is replaced."""
    seed: int = 0
    runs: str = "runs"
    """Folder for everything that runs produce."""
