"""Settings of an export: the formats that it writes, and the settings of `flash export`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from flash.data.settings import DataSettings
from flash.device.settings import DeviceSettings
from flash.errors import check_name, check_seed, require
from flash.interop.settings import GgufFormat
from flash.lowering.settings import GateSettings
from flash.model.settings import BackboneSettings
from flash.tracking.settings import LoggerSettings
from flash.training.settings import TrainerSettings


class ExportFormat(Enum):
    """File or folder that an export writes."""

    executorch = "executorch"
    """`model.pte`, which is also measured on the device."""
    hf = "hf"
    """`hf/`, a folder for stock transformers; skipping attention saves no time there."""
    gguf = "gguf"
    """`model.gguf` for llama.cpp."""


@dataclass(kw_only=True)
class FormatSettings:
    """Formats other than the program: their weights and the agreement that they must reach."""

    gguf: GgufFormat = GgufFormat.q8_0
    """Weights of a GGUF file."""
    gguf_tokenizer: bool = True
    """Include the tokenizer; false writes a file that takes token ids only, for tokenizers that
    llama.cpp does not support, such as those trained by this project."""
    max_error_hf: float = 1e-4
    """Largest difference of a logit in stock transformers, divided by the largest logit."""
    max_kl_gguf: float | None = None
    """Largest mean KL divergence of the GGUF file from the float model [nats]; null: by `gguf`."""
    min_agreement_gguf: float | None = None
    """Least share of positions with the same likeliest token in the GGUF file; null: by `gguf`."""

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
class MixedSettings:
    """Limits under which parts of the program get 8 bits, those first that save most loss.

    Without a limit all parts have 4 bits, but for those of `device.lowering.eight_bit`.
    """

    max_weight_mib: float | None = None
    """Largest size of all weights [MiB]."""
    max_decode_ms: float | None = None
    """Longest decode step at the first of `device.workload.contexts` [ms]. The device measures the
    step with all parts in 4 bits and in 8, and what each part in 8 bits adds to it."""

    @property
    def off(self) -> bool:
        """True without any limit."""
        return self.max_weight_mib is None and self.max_decode_ms is None

    def __post_init__(self) -> None:
        for name in ("max_weight_mib", "max_decode_ms"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number or null")


@dataclass(kw_only=True)
class ExportSettings:
    """Settings of `flash export`."""

    backbone: BackboneSettings = MISSING
    """Backbone that the model was cut out of."""
    device: DeviceSettings = MISSING
    """Device that the program is lowered for and measured on."""
    data: DataSettings = MISSING
    """Held-out text on which formats are compared with the model."""
    trainer: TrainerSettings = MISSING
    """Precision of the float model's held-out loss."""
    logger: LoggerSettings = MISSING
    """Destination of the figures."""
    gate: GateSettings = field(default_factory=GateSettings)
    """Largest accepted difference after each stage of the lowering."""
    mixed: MixedSettings = field(default_factory=MixedSettings)
    """Limits under which parts of the program get 8 bits; off by default."""
    format: list[ExportFormat] = field(default_factory=lambda: [ExportFormat.executorch])
    """Formats to write, such as [executorch,hf,gguf]."""
    formats: FormatSettings = field(default_factory=FormatSettings)
    """Weights and limits of hf and gguf."""
    arch: dict[str, Any] = field(default_factory=dict)
    """Architecture to export, as for `flash train`; empty is the backbone itself."""
    name: str | None = None
    """Name of the result; null makes one of the arch, model or backbone, and of what is not the
    default, such as `tiny-group_size_64`."""
    model: str | None = None
    """Trained weights: the name of a training, or a folder. Null takes the backbone itself where
    the architecture is the backbone's, else the training of the same name or of this architecture.
    `random` measures only the latency, with random weights."""
    prompt: str = "def main("
    """Text that the exported program continues."""
    new_tokens: int = 48
    """Length of the continuation [tokens]."""
    perplexity_tokens: int = 2048
    """Number of held-out tokens on which the rounded decoder and the program are compared with the
    float decoder."""
    overwrite: bool = False
    """Replace an export of the same name that has other weights or settings."""
    seed: int = 0
    """Seed of the order of the data and of random weights."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for name in ("new_tokens", "perplexity_tokens"):
            value = getattr(self, name)
            require(value > 0, name, value, "a positive integer")
        check_seed(self.seed)
