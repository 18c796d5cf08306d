"""Config group `backbone`."""

from dataclasses import dataclass
from typing import Any

from flash.errors import check_name


@dataclass(kw_only=True)
class BackboneSettings:
    """Config group `backbone`."""

    name: str
    """Name of the backbone's own results, unless `name` gives another."""
    weights: str | None = None
    """Hugging Face folder (config.json, safetensors, tokenizer.json), or a model's name on the hub,
    `owner/model` or `owner/model@revision`; null: random."""
    arch: dict[str, Any] | None = None
    """Architecture when there are no weights to read it from."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
