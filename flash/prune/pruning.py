"""The prune operator, which cuts dense weights of a candidate out of a backbone (Sec. 3.3)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash.arch import ArchSpec, Attention
from flash.errors import InputError, shown
from flash.model.checkpoint import expected_shapes
from flash.model.weights import Weights
from flash.prune.importance import Importance


@dataclass(frozen=True)
class Selection:
    """Indices of the parts of the backbone that a candidate keeps, all ascending.

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
    """Check that `spec` can be cut out of `backbone`; errors name keys of `arch`.

    Raises:
        InputError: A size of `spec` is larger, or it differs in a value that pruning cannot change.
    """
    for key in ("num_layers", "model_dim", "ffn_dim"):
        wanted, limit = getattr(spec, key), getattr(backbone, key)
        if wanted > limit:
            raise InputError(
                f"arch.{key}={wanted}: expected at most the backbone's {limit}; "
                "lower it or choose a larger backbone"
            )
    fixed = (
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "qk_norm",
        "qkv_bias",
        "rope_theta",
        "rope_scaling",
    )
    for key in fixed:
        if getattr(spec, key) != getattr(backbone, key):
            raise InputError(
                f"arch.{key}={shown(getattr(spec, key))}: expected the backbone's "
                f"{shown(getattr(backbone, key))}; pruning cannot change it"
            )
    if backbone.tie_embeddings and not spec.tie_embeddings:
        raise InputError("arch.tie_embeddings=false: expected true, as in the backbone")


def select(importance: Importance, spec: ArchSpec) -> Selection:
    """The highest-scoring layers, residual channels and FFN channels for `spec`.

    Channels are chosen one by one, and the kept ones are packed. Group-wise quantization only needs
    their number to be a multiple of the group size, which `ArchSpec` checks.
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
    """The backbone's tensor for the candidate's tensor `name`, and its rows and columns to keep.

    None for rows or columns keeps all of them.
    """
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
    if rest.endswith(("q_norm.weight", "k_norm.weight", ".bias")):
        return source, None, None
    if rest.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return source, None, selection.model
    if rest.endswith("o_proj.weight"):
        return source, selection.model, None
    if rest.endswith("down_proj.weight"):
        return source, selection.model, ffn
    return source, ffn, selection.model  # gate_proj, up_proj


def prune(folder: Path, importance: Importance, spec: ArchSpec) -> dict[str, Tensor]:
    """Weights of `spec`, cut out of the backbone in `folder`, in the dtype of its files.

    Only a part of one tensor is read at a time, so that peak memory is about the candidate's size.
    A candidate with tied embeddings inherits the input embedding of an untied backbone, because the
    layers were trained on it, and a head is learned again faster than all layers.

    Args:
        folder: Checkpoint folder of the backbone.
        importance: Importance scores of the backbone.
        spec: Architecture of the candidate.

    Raises:
        InputError: `spec` or the scores do not fit the backbone, or a file is missing or damaged.
    """
    stored = Weights(folder)  # raises before any work if a file is damaged
    check_fits(spec, stored.spec)
    wanted = (stored.spec.num_layers, stored.spec.ffn_dim)
    if tuple(importance.ffn.shape) != wanted:
        raise InputError(
            f"importance scores are for {tuple(importance.ffn.shape)} layers x FFN channels: "
            f"expected {wanted}; delete them to score again"
        )
    stored.check(expected_shapes(stored.spec))
    selection = select(importance, spec)
    weights = {}
    for name in expected_shapes(spec):
        source, rows, columns = _rows_and_columns(name, selection, spec.layer_types)
        weights[name] = stored.read(source, rows, columns)
    return weights
