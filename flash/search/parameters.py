"""Sizes and kinds of layers of an architecture, as parameters of an Optuna trial."""

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from flash.arch import ArchSpec, Choices, SearchSpace


def distributions(space: SearchSpace, num_layers: int) -> dict[str, BaseDistribution]:
    """Return the distributions of the parameters, with a slot for each of `num_layers` layers."""

    def sizes(choices: Choices) -> IntDistribution:
        return IntDistribution(choices.min, choices.max, step=choices.step)

    kinds = CategoricalDistribution([kind.value for kind in space.kinds])
    return {
        "num_layers": sizes(space.settings.num_layers),
        "model_dim": sizes(space.settings.model_dim),
        "ffn_dim": sizes(space.settings.ffn_dim),
        **{_slot(i): kinds for i in range(num_layers)},
    }


def parameters(spec: ArchSpec) -> dict[str, int | str]:
    """Return the parameters of an architecture, with a slot for each of its layers."""
    return {
        "num_layers": spec.num_layers,
        "model_dim": spec.model_dim,
        "ffn_dim": spec.ffn_dim,
        **{_slot(i): kind.value for i, kind in enumerate(spec.layer_types)},
    }


def _slot(layer: int) -> str:
    return f"layer_{layer:02d}"
