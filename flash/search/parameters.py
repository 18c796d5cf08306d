"""Sizes and kinds of layers of an architecture, as parameters of an Optuna trial."""

from collections.abc import Mapping

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from flash.arch import ArchSpec, Attention, Choices, SearchSpace, Variant


def distributions(space: SearchSpace, num_layers: int) -> dict[str, BaseDistribution]:
    """Return the distributions of the parameters, with a slot for each of `num_layers` layers."""

    def sizes(choices: Choices) -> IntDistribution:
        return IntDistribution(choices.min, choices.max, step=choices.step)

    kinds = CategoricalDistribution([kind.value for kind in space.kinds])
    widths = sizes(space.settings.ffn_dim)
    return {
        "num_layers": sizes(space.settings.num_layers),
        "model_dim": sizes(space.settings.model_dim),
        **{name: widths for name in _ffn_names(space, num_layers)},
        **{name: CategoricalDistribution(texts) for name, texts in _variants(space).items()},
        **{slot(i): kinds for i in range(num_layers)},
    }


def parameters(space: SearchSpace, spec: ArchSpec) -> dict[str, int | str]:
    """Return the parameters of a member of a space, with a slot for each of its layers."""
    texts = _texts(Variant.of(spec))
    return {
        "num_layers": spec.num_layers,
        "model_dim": spec.model_dim,
        **dict(zip(_ffn_names(space, spec.num_layers), spec.ffn_dims, strict=False)),
        **{name: texts[name] for name in _variants(space)},
        **{slot(i): kind.value for i, kind in enumerate(spec.layer_types)},
    }


def member(space: SearchSpace, values: Mapping[str, int | str]) -> ArchSpec:
    """Return the architecture with these parameters; slots past its depth are left out."""
    depth = int(values["num_layers"])
    widths = [int(values[name]) for name in _ffn_names(space, depth)]
    wanted = {name: values[name] for name in _variants(space)}
    return space.make(
        int(values["model_dim"]),
        widths if space.per_layer else widths[0],
        tuple(Attention.parse(str(values[slot(i)])) for i in range(depth)),
        next(v for v in space.variants if wanted.items() <= _texts(v).items()),
    )


def _variants(space: SearchSpace) -> dict[str, list[str]]:
    """Return the values of heads and vocabulary; those without a choice are left out."""
    texts = [_texts(variant) for variant in space.variants]
    values = {name: list(dict.fromkeys(t[name] for t in texts)) for name in texts[0]}
    return {name: each for name, each in values.items() if len(each) > 1}


def _texts(variant: Variant) -> dict[str, str]:
    return {
        "heads": f"{variant.num_heads}/{variant.num_kv_heads}",
        "vocab_size": str(variant.vocab_size),
    }


def slot(layer: int) -> str:
    """Return the name of the parameter with the kind of a layer."""
    return f"layer_{layer:02d}"


def _ffn_names(space: SearchSpace, num_layers: int) -> list[str]:
    """Return the names of the FFN widths: one for each layer if the space has that many."""
    return [f"ffn_{i:02d}" for i in range(num_layers)] if space.per_layer else ["ffn_dim"]
