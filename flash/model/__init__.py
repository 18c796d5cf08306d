"""The decoder, its losses, and Hugging Face checkpoints."""

from flash.model.backbone import Backbone, BackboneSettings
from flash.model.checkpoint import build, expected_shapes, load, save, state_to_save
from flash.model.decoder import Decoder, LayerCache, generate
from flash.model.families import from_config, to_config
from flash.model.losses import (
    LossSums,
    Operands,
    TopLogProbs,
    linear_losses,
    top_log_probs,
)
from flash.model.quantization import fake_quantize, head_operands
from flash.model.weights import Weights, read_spec, weight_files

__all__ = [
    "Backbone",
    "BackboneSettings",
    "Decoder",
    "LayerCache",
    "LossSums",
    "Operands",
    "TopLogProbs",
    "Weights",
    "build",
    "expected_shapes",
    "fake_quantize",
    "from_config",
    "generate",
    "head_operands",
    "load",
    "linear_losses",
    "read_spec",
    "save",
    "state_to_save",
    "top_log_probs",
    "to_config",
    "weight_files",
]
