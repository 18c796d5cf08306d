"""The prune operator: backbone file + importance + architecture -> dense weights (Sec. 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flash.arch import ArchSpec, Attention
from flash.errors import InputError
from flash.model import open_weights, read_spec, weights_file
from flash.model.checkpoint import expected_shapes
from flash.prune.importance import Importance

CHUNK_BYTES = 32 * 2**20
"""Most of the backbone that is mapped at a time."""


@dataclass(frozen=True)
class Selection:
    """What of the backbone a candidate keeps, all indices ascending.

    Attributes:
        layers: Kept layers, `(num_layers,)`.
        model: Kept residual channels, `(model_dim,)`.
        ffn: Kept FFN channels of each kept layer, `(num_layers, ffn_dim)`.
    """

    layers: Tensor
    model: Tensor
    ffn: Tensor


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def check_fits(spec: ArchSpec, backbone: ArchSpec) -> None:
    """Check that `spec` can be cut out of `backbone`.

    Raises:
        InputError: It is larger somewhere, or differs in what pruning cannot change.
    """
    for key in ("num_layers", "model_dim", "ffn_dim"):
        wanted, limit = getattr(spec, key), getattr(backbone, key)
        if wanted > limit:
            raise InputError(
                f"arch.{key}={wanted}: expected at most the backbone's {limit}; "
                "lower it or choose a larger backbone"
            )
    fixed = ("num_heads", "num_kv_heads", "head_dim", "vocab_size", "qk_norm", "rope_theta")
    for key in fixed:
        if getattr(spec, key) != getattr(backbone, key):
            raise InputError(
                f"arch.{key}={getattr(spec, key)}: expected the backbone's "
                f"{getattr(backbone, key)}; pruning cannot change it"
            )
    if backbone.tie_embeddings and not spec.tie_embeddings:
        raise InputError("arch.tie_embeddings=false: expected true, as in the backbone")


def select(importance: Importance, spec: ArchSpec) -> Selection:
    """The highest-scoring layers, residual channels and FFN channels for `spec`.

    Channels are chosen one by one; that their number is a multiple of the quantisation group
    (`ArchSpec` checks it) is what group-wise quantisation needs, since the kept ones are packed.
    """
    layers = _top(importance.layers, spec.num_layers)
    return Selection(
        layers=layers,
        model=_top(importance.model, spec.model_dim),
        ffn=_top(importance.ffn[layers], spec.ffn_dim),
    )


def _rows_and_columns(
    name: str, selection: Selection, kinds: tuple[Attention, ...]
) -> tuple[str, Tensor | None, Tensor | None]:
    """Source tensor of the candidate's tensor `name`, and the rows and columns to keep of it."""
    if not name.startswith("model.layers."):
        if name == "model.norm.weight":
            return name, selection.model, None
        return name, None, selection.model  # embedding and head: vocabulary x channels
    _, _, index, rest = name.split(".", 3)
    slot = int(index)
    source = f"model.layers.{int(selection.layers[slot])}.{rest}"
    ffn = selection.ffn[slot]
    assert kinds[slot] is not Attention.skip_attention or not rest.startswith("self_attn")
    if rest.endswith("layernorm.weight"):
        return source, selection.model, None
    if rest.endswith(("q_norm.weight", "k_norm.weight")):
        return source, None, None
    if rest.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return source, None, selection.model
    if rest.endswith("o_proj.weight"):
        return source, selection.model, None
    if rest.endswith("down_proj.weight"):
        return source, selection.model, ffn
    return source, ffn, selection.model  # gate_proj, up_proj


def _chunks(path: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    """Row ranges of a tensor, each mapped alone: pages of one are released before the next.

    A mapped page counts as resident memory for as long as its mapping lives, so one mapping for
    the whole file would make the peak the size of the backbone.
    """
    start, rows = 0, 1
    while start < rows:
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(name)
            shape = view.get_shape()
            rows = shape[0]
            row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
            step = max(1, CHUNK_BYTES // row_bytes)
            yield start, view[start : start + step]
        start += step


def _gather(path: Path, name: str, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The chosen rows and columns of a tensor, copied into place chunk by chunk."""
    out: Tensor | None = None
    filled = 0
    for start, chunk in _chunks(path, name):
        if rows is not None:
            inside = rows[(rows >= start) & (rows < start + chunk.shape[0])] - start
            chunk = chunk.index_select(0, inside)
        if columns is not None:
            chunk = chunk.index_select(1, columns)
        if out is None:
            with safe_open(path, framework="pt") as file:
                total = file.get_slice(name).get_shape()[0] if rows is None else len(rows)
            out = chunk.new_empty((total, *chunk.shape[1:]))
        out[filled : filled + chunk.shape[0]] = chunk
        filled += chunk.shape[0]
    assert out is not None
    assert filled == out.shape[0]
    return out


def prune(folder: Path, importance: Importance, spec: ArchSpec) -> dict[str, Tensor]:
    """Weights of `spec`, cut out of the backbone in `folder`, in the dtype they are stored in.

    Reads only one part of one tensor at a time, so peak memory is about the candidate's size. A
    tied candidate of an untied backbone inherits the input embedding: the layers were trained on
    it, and a head is relearnt sooner than every layer behind a foreign embedding.

    Raises:
        InputError: `spec` does not fit the backbone, or the file is missing or damaged.
    """
    backbone = read_spec(folder)
    check_fits(spec, backbone)
    if tuple(importance.ffn.shape) != (backbone.num_layers, backbone.ffn_dim):
        raise InputError(
            f"importance scores are for {tuple(importance.ffn.shape)} layers x FFN channels: "
            f"expected {(backbone.num_layers, backbone.ffn_dim)}; delete them to score again"
        )
    with open_weights(folder):  # a damaged file is named here, before any work
        path = weights_file(folder)
    selection = select(importance, spec)
    weights = {}
    for name in expected_shapes(spec):
        source, rows, columns = _rows_and_columns(name, selection, spec.layer_types)
        try:
            weights[name] = _gather(path, source, rows, columns)
        except SafetensorError as error:
            raise InputError(f"{path}: tensor {source} cannot be read ({error})") from error
    return weights
