"""The prune operator, which cuts dense weights of a candidate out of a backbone (Sec. 3.3)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash.arch import ArchSpec
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
        ffn: Kept FFN channels of each kept layer, `(ffn_dims[i],)`.
        heads: Kept query heads of each kept layer, `(num_layers, num_heads)`; None keeps all.
    """

    layers: Tensor
    model: Tensor
    ffn: list[Tensor]
    heads: Tensor | None


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; ties go to the lower index."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def check_fits(spec: ArchSpec, backbone: ArchSpec) -> None:
    """Check that `spec` can be cut out of `backbone`; errors name keys of `arch`.

    Raises:
        InputError: A size of `spec` is larger, or it differs in a value that pruning cannot change.
    """
    same_depth = spec.num_layers == backbone.num_layers  # then layers keep their places
    limits = backbone.ffn_dims if same_depth else [min(backbone.ffn_dims)] * spec.num_layers
    for key, wanted, limit in (
        ("num_layers", spec.num_layers, backbone.num_layers),
        ("model_dim", spec.model_dim, backbone.model_dim),
        ("num_heads", spec.num_heads, backbone.num_heads),
        ("vocab_size", spec.vocab_size, backbone.vocab_size),
        *(("ffn_dim", *pair) for pair in zip(spec.ffn_dims, limits, strict=True)),
    ):
        if wanted > limit:
            raise InputError(
                f"arch.{key}={wanted}: expected at most the backbone's {limit}; "
                "lower it or choose a larger backbone"
            )
    if backbone.num_kv_heads % spec.num_kv_heads:
        raise InputError(
            f"arch.num_kv_heads={spec.num_kv_heads}: expected a divisor of the backbone's "
            f"{backbone.num_kv_heads}, since equal numbers of its heads are merged"
        )
    fixed = (
        "head_dim",
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
    """The highest-scoring layers, channels and query heads for `spec`.

    Channels are chosen one by one, and the kept ones are packed. Group-wise quantization only needs
    their number to be a multiple of the group size, which `ArchSpec` checks. Of the query heads,
    each key head of the candidate keeps as many.
    """
    layers, heads = _top(importance.layers, spec.num_layers), None
    if spec.num_heads < importance.heads.shape[1]:
        groups = importance.heads[layers].unflatten(1, (spec.num_kv_heads, -1))
        firsts = torch.arange(spec.num_kv_heads)[:, None] * groups.shape[2]
        heads = (_top(groups, spec.num_heads // spec.num_kv_heads) + firsts).flatten(1)
    return Selection(
        layers=layers,
        model=_top(importance.model, spec.model_dim),
        ffn=[
            _top(importance.ffn[layer], width)
            for layer, width in zip(layers, spec.ffn_dims, strict=True)
        ],
        heads=heads,
    )


@dataclass(frozen=True)
class _Part:
    """The part of a tensor of the backbone that makes a tensor of a candidate.

    Attributes:
        source: Name of the backbone's tensor.
        rows: Kept rows; None keeps all.
        columns: Kept columns; None keeps all.
        merged: True if the key heads of the backbone are merged to those of the candidate.
    """

    source: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    merged: bool = False


def _part(name: str, selection: Selection, spec: ArchSpec) -> _Part:
    """The part of the backbone that makes the candidate's tensor `name`."""
    if not name.startswith("model.layers."):
        if name == "model.norm.weight":
            return _Part(name, selection.model)
        return _Part(name, None, selection.model)  # embedding and head: vocabulary x channels
    _, _, index, rest = name.split(".", 3)
    slot = int(index)
    source = f"model.layers.{int(selection.layers[slot])}.{rest}"
    ffn, query_rows = selection.ffn[slot], None
    if selection.heads is not None:
        firsts = selection.heads[slot][:, None] * spec.head_dim
        query_rows = (firsts + torch.arange(spec.head_dim)).flatten()
    assert spec.layer_types[slot].attends or not rest.startswith("self_attn")
    if rest.endswith("layernorm.weight"):
        return _Part(source, selection.model)
    if rest.endswith(("q_norm.weight", "k_norm.weight")):
        return _Part(source)
    match rest.split(".")[1:]:
        case ["q_proj", kind]:
            return _Part(source, query_rows, selection.model if kind == "weight" else None)
        case ["k_proj" | "v_proj", kind]:
            columns = selection.model if kind == "weight" else None
            return _Part(source, None, columns, merged=True)
        case ["o_proj", _]:
            return _Part(source, selection.model, query_rows)
        case ["down_proj", _]:
            return _Part(source, selection.model, ffn)
    return _Part(source, ffn, selection.model)  # gate_proj, up_proj


def _merged(tensor: Tensor, spec: ArchSpec) -> Tensor:
    """Average the rows of the backbone's key or value heads that make one of the candidate's.

    Neighboring heads are merged (GQA, arXiv:2305.13245).
    """
    heads = tensor.unflatten(0, (spec.num_kv_heads, -1, spec.head_dim))
    if heads.shape[1] == 1:
        return tensor
    return heads.float().mean(dim=1).flatten(0, 1).to(tensor.dtype)


def prune(folder: Path, importance: Importance, spec: ArchSpec) -> dict[str, Tensor]:
    """Weights of `spec`, cut out of the backbone in `folder`, in the dtype of its files.

    Only a part of one tensor is read at a time, so that peak memory is about the candidate's size.
    A candidate with tied embeddings inherits the input embedding of an untied backbone, because the
    layers were trained on it, and a head is learned again faster than all layers.

    Args:
        folder: Checkpoint folder of the backbone.
        importance: Importance scores of the backbone.
        spec: Architecture of the candidate, with the backbone's vocabulary; see
            `flash.prune.vocabulary` for a backbone with a smaller one.

    Raises:
        InputError: `spec` or the scores do not fit the backbone, or a file is missing or damaged.
    """
    stored = Weights(folder)  # raises before any work if a file is damaged
    check_fits(spec, stored.spec)
    assert spec.vocab_size == stored.spec.vocab_size
    if not importance.fits(stored.spec):
        raise InputError(
            f"importance scores are for {tuple(importance.ffn.shape)} layers x FFN channels, "
            f"{len(importance.model)} channels and {importance.heads.shape[1]} heads: expected "
            f"those of {stored.spec}; delete them to score again"
        )
    stored.check(expected_shapes(stored.spec))
    selection = select(importance, spec)
    weights = {}
    for name in expected_shapes(spec):
        part = _part(name, selection, spec)
        tensor = stored.read(part.source, part.rows, part.columns)
        weights[name] = _merged(tensor, spec) if part.merged else tensor
    return weights
