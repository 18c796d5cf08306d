"""Rounding of the weights of an export, and its check before the lowering."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from flash.arch import Quantization
from flash.errors import InputError, shown
from flash.lowering.depth_profile import describe_costs, part_costs
from flash.lowering.rounding_check import RoundingCheck, check_rounding
from flash.lowering.settings import GateSettings, LoweringSettings
from flash.model.decoder import Decoder
from flash.model.weights import read_metadata
from flash.rounding.decoder import round_decoder, round_embedding
from flash.rounding.settings import Rounding, TrainedRounding, WeightFormat
from flash.terminal import table
from flash.training.result import TrainResult
from flash.training.settings import RecipeSettings

log = logging.getLogger(__name__)

PROFILE_TOKENS = 256
"""Tokens on which the cost of each part is compared after a failed check."""


@dataclass(frozen=True)
class RoundingChoice:
    """Rounding of one export.

    Attributes:
        method: Choice of the integers.
        rotate: True if the weights are turned first.
    """

    method: Rounding
    rotate: bool

    @classmethod
    def of(cls, lowering: LoweringSettings, weights: Path) -> "RoundingChoice":
        """Choose what the settings leave open by the training of a checkpoint folder."""
        trained = trained_rounding(weights)
        method, rotate = lowering.rounding, lowering.rotate
        if rotate is None:
            rotate = method is Rounding.gptq if trained is None else trained.rotate
        return cls(method, rotate)

    def calibrated(self, lowering: LoweringSettings) -> bool:
        """True if the rounding reads calibration text."""
        rounds = lowering.quantization is not Quantization.fp32
        return rounds and self.method is Rounding.gptq

    def identity(self, lowering: LoweringSettings) -> list[Any]:
        """Plain values that decide the integers; empty for a program in fp32."""
        if lowering.quantization is Quantization.fp32:
            return []
        return [str(self), lowering.calibration_tokens if self.calibrated(lowering) else None]

    def __str__(self) -> str:
        return f"{'rotate + ' if self.rotate else ''}{self.method.value}"


def warn_of_other_rounding(name: str, lowering: LoweringSettings, weights: Path) -> None:
    """Warn if the weights were trained for another rounding than the device's."""
    trained = trained_rounding(weights)
    for key, theirs in asdict(trained).items() if trained is not None else ():
        ours = getattr(lowering, key)
        if ours is not None and ours != theirs:
            log.warning(
                "%s was trained with recipe.qat_%s=%s, not with device.lowering.%s=%s: the program "
                "loses part of the benefit of that training",
                *(name, key, shown(theirs), key, shown(ours)),
            )


def trained_rounding(weights: Path) -> TrainedRounding | None:
    """Find the rounding that the weights of a checkpoint folder were trained for, if any.

    Raises:
        InputError: The file of weights, or the result beside an older one, is damaged.
    """
    metadata = read_metadata(weights)
    try:
        found = TrainedRounding.of_metadata(metadata)
    except ValueError as error:
        raise InputError(
            f"{weights}: damaged metadata ({error}); copy the weights again"
        ) from error
    if found is not None:
        return found
    result = TrainResult.read(weights.parent)  # older checkpoints say nothing
    recipe = result.settings["recipe"] if result is not None else {}
    if not recipe.get("qat"):
        return None
    return TrainedRounding(
        group_size=recipe.get("qat_group_size", RecipeSettings.qat_group_size),
        embedding_bits=recipe.get("qat_embedding_bits", RecipeSettings.qat_embedding_bits),
        rotate=recipe.get("qat_rotate", False),
    )


def rounded_decoder(
    model: Decoder,
    lowering: LoweringSettings,
    choice: RoundingChoice,
    calibration: Int[Tensor, "n s"] | None,
) -> Decoder:
    """Round the weights of a decoder; for a program in fp32 it stays as it is.

    Args:
        model: Decoder in float32.
        lowering: Integers of the program.
        choice: Rounding of this export.
        calibration: Token ids of training text, for `gptq` only.
    """
    if lowering.quantization is Quantization.fp32:
        return model
    return round_decoder(
        model,
        lowering.weight_format,
        choice.method,
        rotate=choice.rotate,
        calibration=calibration,
    )


@dataclass(frozen=True)
class FailedRounding:
    """A rounding beyond the limits, with what is needed to find a remedy.

    Attributes:
        model: Decoder in float32.
        rounded: The same decoder as it was rounded.
        lowering: Integers of the program.
        choice: Rounding of this export.
        check: Comparison of both decoders.
        texts: Held-out sequences of that comparison.
        gate: Limits of that comparison.
        calibration: Token ids of training text.
        mixed: True if the parts in 8 bits were chosen for this rounding.
    """

    model: Decoder
    rounded: Decoder
    lowering: LoweringSettings
    choice: RoundingChoice
    check: RoundingCheck
    texts: Sequence[Tensor]
    gate: GateSettings
    calibration: Tensor
    mixed: bool

    def where(self) -> str:
        """Name the part that rounding costs most, or say how its costs spread over the depth."""
        text = self.texts[0][:PROFILE_TOKENS]
        return describe_costs(
            part_costs(self.model, self.rounded, text, rotated=self.choice.rotate)
        )

    def remedy(self, training: Sequence[str]) -> str:
        """Compare the losses of other roundings, and word what to do.

        Args:
            training: Commands that train the model for its rounding, and export it.
        """
        checks = {str(self.choice): (self.check, "")}
        if not self.mixed:
            checks |= self._others()
        losses = table(
            [["weights", "loss", "perplexity", "kl"]]
            + [["float", f"{self.check.change.float_loss:.4f}", "", ""]]
            + [
                [name, f"{check.change.loss:.4f}", str(check.change), f"{check.kl:.2g}"]
                for name, (check, _) in checks.items()
            ]
        )
        found = f"{losses}\n{self.check.rule}: "
        enough = [keys for check, keys in checks.values() if check.passed]
        if enough:
            return f"{found}give {enough[0]}"
        if self.mixed:
            found += "give a higher limit of mixed (other ways to round were not tried, as mixed "
            found += "would choose other parts for them), or "
        else:
            most_mib = self.lowering.weight_bytes(self.model.spec) / 2**20
            found += "give 8 bits to the parts that save most by mixed.max_weight_mib, more than "
            found += f"the {most_mib:.1f} that they take now, or "
        lines = "".join(f"\n  {command}" for command in training)
        return f"{found}train it for the rounding, and export that:{lines}"

    def _others(self) -> dict[str, tuple[RoundingCheck, str]]:
        """Checks of other roundings, by name, with the settings that ask for them."""
        checks = {}
        for method, rotate in ((Rounding.nearest, False), (Rounding.gptq, True)):
            choice = RoundingChoice(method, rotate)
            if choice != self.choice:
                rounded = rounded_decoder(self.model, self.lowering, choice, self.calibration)
                keys = f"rounding={method.value} device.lowering.rotate={shown(rotate)}"
                checks[str(choice)] = self._compare(rounded), f"device.lowering.{keys}"
        if self.lowering.embedding_bits == 4:
            embedding = self.rounded.model.embed_tokens
            wide = WeightFormat(self.lowering.group_size, embedding_bits=8)
            self.rounded.model.embed_tokens = round_embedding(
                self.model, wide, mse=True, rotate=self.choice.rotate
            )
            check = self._compare(self.rounded), "device.lowering.embedding_bits=8"
            checks[f"{self.choice}, embedding in 8 bits"] = check
            self.rounded.model.embed_tokens = embedding
        return checks

    def _compare(self, rounded: Decoder) -> RoundingCheck:
        return check_rounding(self.model, rounded, self.texts, self.gate)
