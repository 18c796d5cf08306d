"""Importance of channels, layers and query heads, from one pass over calibration text."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flash.arch import ArchSpec
from flash.errors import InputError, under
from flash.model.decoder import Decoder, Layer, RMSNorm, SelfAttention
from flash.model.weights import all_finite, read_spec, weight_files
from flash.progress import progress
from flash.records import parse_json
from flash.sealed import read_tensors, write_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _About:
    """Facts of the scores, as JSON in the metadata of their file."""

    tokens: int
    backbone: str


@dataclass(frozen=True)
class Importance:
    """Importance metrics of the paper (Sec. 3.3), as means over all calibration positions.

    Attributes:
        ffn: Mean magnitude of each hidden FFN activation, `(layers, ffn_dim)`. Narrower layers
            have zeros at the end.
        model: Mean magnitude of each channel of the norms' outputs, over all norms,
            `(model_dim,)`. The paper's formula has one value per position, which cannot rank
            channels; here it is computed per channel.
        layers: 1 - mean cosine similarity of a layer's input and output, `(layers,)`.
        heads: Mean magnitude of each query head's output in front of the output projection,
            `(layers, num_heads)`; zeros in layers without attention. The paper keeps all heads.
        tokens: Number of calibration positions.
        backbone: `fingerprint` of the scored weights.
    """

    ffn: Float[Tensor, "layers ffn_dim"]
    model: Float[Tensor, " model_dim"]
    layers: Float[Tensor, " layers"]
    heads: Float[Tensor, "layers num_heads"]
    tokens: int
    backbone: str

    @property
    def digest(self) -> str:
        """Hash of the scores, to record with the models that were pruned by them.

        Those of heads are left out: they come from the same pass, and hashes of the others stand in
        results that were made before there were any.
        """
        hasher = hashlib.sha256()
        for scores in (self.ffn, self.model, self.layers):
            hasher.update(scores.contiguous().numpy().tobytes())
        return hasher.hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the scores to a safetensors file, atomically."""
        tensors = {name: getattr(self, name) for name in _AXES}
        about = json.dumps({"tokens": self.tokens, "backbone": self.backbone})
        write_tensors(path, tensors, {"importance": about})

    @classmethod
    def read(cls, path: Path) -> "Importance":
        """Read scores that `write` has stored.

        Raises:
            InputError: The file is damaged or holds no importance scores.
        """
        tensors, found = read_tensors(path)
        with under(str(path), ": not importance scores: "):
            about = parse_json(_About, found.get("importance", "null"))
        if {name: tensor.ndim for name, tensor in tensors.items()} != _AXES:
            raise InputError(f"{path}: not importance scores: of other tensors or shapes")
        if not all(t.dtype is torch.float32 and all_finite(t) for t in tensors.values()):
            raise InputError(f"{path}: not importance scores: of another type, or not finite")
        return cls(**tensors, tokens=about.tokens, backbone=about.backbone)

    def fits(self, spec: ArchSpec) -> bool:
        """True if there is a score for each layer, channel and head of `spec`, and no other."""
        layers = spec.num_layers
        return {name: tuple(getattr(self, name).shape) for name in _AXES} == {
            "ffn": (layers, max(spec.ffn_dims)),
            "model": (spec.model_dim,),
            "layers": (layers,),
            "heads": (layers, spec.num_heads),
        }


_AXES = {"ffn": 2, "model": 1, "layers": 1, "heads": 2}
"""Number of axes of each tensor of scores."""


def fingerprint(folder: Path) -> str:
    """Hash the config and the weights in a checkpoint folder."""
    hasher = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:16]


class _Sums:
    """Running sums by name: a batch is summed in float32, batches are added in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add `values` of shape `(positions, n)` to the sums of `name`."""
        total = values.float().sum(dim=0).double().cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + values.shape[0]

    def mean(self, name: str) -> Tensor:
        return (self.sums[name] / self.counts[name]).float()


def _hooks(sums: _Sums, model: Decoder) -> list[Any]:
    """Register hooks that add the activations to `sums`, and return their handles."""

    def ffn_hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums.add(f"ffn.{index}", args[0].abs().flatten(0, 1))

        return hook

    def head_hook(
        index: int, attention: SelfAttention
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            heads = args[0].abs().flatten(0, 1).unflatten(-1, (-1, attention.head_dim))
            sums.add(f"heads.{index}", heads.mean(dim=-1))

        return hook

    def layer_hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            before, after = args[0].flatten(0, 1).float(), output[0].flatten(0, 1).float()
            similarity = F.cosine_similarity(before, after, dim=-1)
            sums.add(f"layer.{index}", (1 - similarity)[:, None])

        return hook

    def norm_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add("model", output.abs().flatten(0, 1))

    handles: list[Any] = []
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(ffn_hook(index)))
        handles.append(layer.register_forward_hook(layer_hook(index)))
        if layer.kind.attends:
            hook = head_hook(index, layer.self_attn)
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(hook))
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and not name.endswith(("q_norm", "k_norm")):
            handles.append(module.register_forward_hook(norm_hook))
    return handles


@torch.no_grad()
def score(model: Decoder, batches: Iterable[Tensor], backbone: str) -> Importance:
    """Compute importance scores of `model` in one pass over calibration text.

    The memory needed does not depend on the number of tokens.

    Args:
        model: The backbone.
        batches: Token ids, `(b, s)` each.
        backbone: `fingerprint` of the backbone.

    Raises:
        InputError: There is no batch.
    """
    sums = _Sums()
    handles = _hooks(sums, model)
    tokens = 0
    try:
        device = next(model.parameters()).device
        for batch in batches:
            model.hidden(batch.to(device))
            tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise InputError("recipe.calibration_tokens: expected at least one batch of text")
    layers = range(model.spec.num_layers)
    widest, num_heads = max(model.spec.ffn_dims), model.spec.num_heads
    attending = model.spec.attention_layers
    return Importance(
        ffn=torch.stack([_padded(sums.mean(f"ffn.{i}"), widest) for i in layers]),
        model=sums.mean("model"),
        layers=torch.cat([sums.mean(f"layer.{i}") for i in layers]),
        heads=torch.stack([
            sums.mean(f"heads.{i}") if i in attending else torch.zeros(num_heads) for i in layers
        ]),
        tokens=tokens,
        backbone=backbone,
    )


def _padded(scores: Float[Tensor, " n"], length: int) -> Float[Tensor, " length"]:
    return F.pad(scores, (0, length - len(scores)))


def cached_scores(
    path: Path, folder: Path, load: Callable[[], Decoder], batches: Iterable[Tensor], count: int
) -> Importance:
    """Read scores from `path` if they belong to this backbone; else compute and store them.

    A damaged file is reported, and its scores are computed again.

    Args:
        path: File of the scores.
        folder: Checkpoint folder of the backbone.
        load: Function that loads the backbone; called only if the scores must be computed.
        batches: Calibration batches of token ids, `(b, s)` each.
        count: Number of batches, for the progress bar.

    Raises:
        InputError: There is no batch.
    """
    backbone = fingerprint(folder)
    if path.exists():
        try:
            found = Importance.read(path)
            if found.backbone == backbone and found.fits(read_spec(folder)):
                return found
            log.warning("%s: of another backbone; its scores are computed again", path)
        except InputError as error:
            log.warning("%s; its scores are computed again", error)
    found = score(load(), progress(batches, "importance", count), backbone)
    found.write(path)
    return found
