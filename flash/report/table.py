"""The result table: the backbone and each winner, for terminals and for the page."""

from collections.abc import Sequence

from flash.export.perplexity import ProgramQuality
from flash.report.data import Model

COLUMNS = (
    "model",
    "params",
    "loss before",
    "loss after",
    "bits/byte before",
    "bits/byte after",
    "predicted TTFT ms [90 %]",
    "TTFT ms",
    "decode tok/s",
    ".pte MiB",
    "speed-up",
)
NONE = "-"


def rows(models: Sequence[Model]) -> list[list[str]]:
    """One row of text a model, in the order of `COLUMNS`; what is not known yet is a dash."""
    return [_row(model) for model in models]


def _row(model: Model) -> list[str]:
    loss, bits = [NONE, NONE], [NONE, NONE]
    if model.backbone_quality is not None:
        loss[0] = f"{model.backbone_quality['loss']:.3f}"
        bits[0] = f"{model.backbone_quality['bits_per_byte']:.3f}"
    if model.trained is not None:
        quality = (model.trained.before, model.trained.after)
        loss = [f"{each.loss:.3f}" for each in quality]
        bits = [f"{each.bits_per_byte:.3f}" for each in quality]
    headline = next(name for name in model.predicted if name.startswith("prefill"))
    ttft = model.predicted[headline]
    measured = [NONE] * 4
    if model.exported is not None:
        result = model.exported.measurement
        speedup = model.exported.speedups.get(headline)
        measured = [
            f"{result.prefill.ms:.1f} +- {result.prefill.se_ms:.1f}",
            f"{1e3 / result.decode.ms:.0f}",
            f"{model.exported.pte_bytes / 2**20:.2f}",
            f"{speedup:.2f}x" if speedup is not None else "1.00x",
        ]
    interval = f"{ttft['mean_ms']:.1f} [{ttft['low_ms']:.1f}, {ttft['high_ms']:.1f}]"
    return [model.name, f"{model.parameters / 1e6:.2f}M", *loss, *bits, interval, *measured]


QUANTISATION = (
    "model",
    "float",
    "8da4w after training",
    "perplexity",
    "8da4w with QAT",
    "perplexity",
)


def quantisation_rows(models: Sequence[Model]) -> list[list[str]]:
    """Losses of float weights and of programs on the same held-out tokens, in nats a token.

    The change of perplexity is from the float model of the same weights: of those after training,
    and of those that training aware of the rounding made of them.
    """
    lines = []
    for model in models:
        if model.exported is None:
            continue
        plain, aware = model.exported.artefact, model.aware
        line = [model.name, f"{plain.float_loss:.3f}", *_rounded(plain)]
        lines.append([*line, *(_rounded(aware.artefact) if aware else [NONE, NONE])])
    return lines


def _rounded(quality: ProgramQuality) -> list[str]:
    return [f"{quality.pte_loss:.3f}", f"{quality.change_pct:+.1f} %"]


def as_text(models: Sequence[Model]) -> str:
    """The table in Markdown, aligned so that it also reads well on a terminal."""
    lines = [list(COLUMNS), *rows(models)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    padded = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])
