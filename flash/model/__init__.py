"""The decoder, its losses, and Hugging Face checkpoints."""

from flash.model.backbone import Backbone, BackboneSettings
from flash.model.checkpoint import (
    build,
    from_config,
    load,
    open_weights,
    read_spec,
    save,
    state_to_save,
    to_config,
    weights_file,
)
from flash.model.decoder import Decoder, LayerCache, generate
from flash.model.losses import cross_entropy, distillation, over_chunks

__all__ = [
    "Backbone",
    "BackboneSettings",
    "Decoder",
    "LayerCache",
    "build",
    "cross_entropy",
    "distillation",
    "from_config",
    "generate",
    "load",
    "open_weights",
    "over_chunks",
    "read_spec",
    "save",
    "state_to_save",
    "to_config",
    "weights_file",
]
