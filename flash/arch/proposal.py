"""Proposal of a search space for a backbone."""

import math

from flash.arch.space import Choices, FfnChoices, SpaceSettings
from flash.arch.spec import GROUP, ArchSpec

_SMALLEST = {"num_layers": 10 / 16, "model_dim": 1024 / 2048, "ffn_dim": 2048 / 8192}
"""Smallest value of each size relative to the backbone's: Table 3 relative to its backbone."""
_MOST_VALUES = 25
"""Most values of a width, as `ffn_dim` has in Table 3."""


def propose_space(name: str, backbone: ArchSpec) -> SpaceSettings:
    """Propose a space with the proportions of the paper's Table 3 for another backbone.

    Depth goes from 10/16 of the backbone's, width from 1/2 and FFN width from 1/4 up to the
    backbone's own. Widths are whole groups of 32, in steps that give at most 25 values.
    """

    def widths(size: str, limit: int) -> tuple[int, int, int]:
        largest = limit // GROUP
        smallest = math.ceil(_SMALLEST[size] * largest)
        step = math.ceil((largest - smallest) / (_MOST_VALUES - 1)) or 1
        smallest = largest - (largest - smallest) // step * step
        return smallest * GROUP, largest * GROUP, step * GROUP

    depth = backbone.num_layers
    least, greatest, step = widths("model_dim", backbone.model_dim)
    least_ffn, greatest_ffn, step_ffn = widths("ffn_dim", min(backbone.ffn_dims))
    return SpaceSettings(
        name=name,
        num_layers=Choices(min=math.ceil(_SMALLEST["num_layers"] * depth), max=depth),
        model_dim=Choices(min=least, max=greatest, step=step),
        ffn_dim=FfnChoices(min=least_ffn, max=greatest_ffn, step=step_ffn),
    )


def space_yaml(settings: SpaceSettings, origin: str) -> str:
    """The file of a config group `space` with these settings, and `origin` in a comment."""

    def choices(key: str) -> str:
        found: Choices = getattr(settings, key)
        return f"{key}: {{min: {found.min}, max: {found.max}, step: {found.step}}}"

    kinds = ", ".join(kind.value for kind in settings.kinds)
    return "\n".join([
        f"# The proportions of the paper's Table 3 for {origin}.",
        f"name: {settings.name}",
        *map(choices, ("num_layers", "model_dim", "ffn_dim")),
        f"kinds: [{kinds}]",
        f"max_efficient_run: {settings.max_efficient_run}",
        "",
    ])
