"""Tables of the report: results of backbone and winners, and the loss of quantization."""

from collections.abc import Sequence

from flash.export.result import ExportResult, ProgramQuality
from flash.report.data import Model, StudyData, is_qat
from flash.terminal import table

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
    ".pte perplexity",
)
NONE = "-"

_LONGEST_NAME = 28
"""Characters of a name in a table for terminals."""


def rows(models: Sequence[Model]) -> list[list[str]]:
    """Return a row of text for each model, in the order of `COLUMNS`; unknown cells are dashes."""
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
    elif model.exported is not None and model.backbone_quality is None:
        loss[1] = f"{model.exported.quality.loss:.3f}"
        bits[1] = f"{model.exported.quality.bits_per_byte:.3f}"
    measured = [NONE] * 5
    if model.exported is not None:
        result = model.exported.measurement
        measured = [
            f"{result.prefill.ms:.1f} +- {result.prefill.se_ms:.1f}",
            f"{1e3 / result.decode.ms:.0f}",
            f"{model.exported.pte_bytes / 2**20:.2f}",
            _speedup(model),
            f"{model.exported.program_quality.change.perplexity_pct:+.1f} %",
        ]
    return [model.title, f"{model.parameters / 1e6:.2f}M", *loss, *bits, _ttft(model), *measured]


def _speedup(model: Model) -> str:
    """Return the speed-up of the first prompt over the backbone's program."""
    return _speedup_of(model, model.exported)


def _speedup_of(model: Model, exported: ExportResult | None) -> str:
    if model.backbone_quality is not None:
        return "1.00x"
    speedups = exported.speedups if exported is not None else {}
    headline = next((name for name in speedups if name.startswith("prefill")), None)
    return NONE if headline is None else f"{speedups[headline]:.2f}x"


def measured_rows(study: StudyData) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of what was measured on each of several devices.

    Models that were exported on the first device alone are in the table of results only; without
    others both are empty.
    """
    models = [model for model in study.models if model.elsewhere]
    if not models:
        return [], []
    names = [*study.search.devices]
    columns = ["model"]
    for name in names:
        columns += [f"{name} TTFT [ms]", f"{name} decode [tok/s]", f"{name} speed-up"]
    lines = []
    for model in models:
        line = [model.title]
        for name in names:
            exported = model.elsewhere.get(name, model.exported if name == names[0] else None)
            if exported is None:
                line += [NONE] * 3
                continue
            result = exported.measurement
            line += [f"{result.prefill.ms:.1f} +- {result.prefill.se_ms:.1f}"]
            line += [f"{1e3 / result.decode.ms:.0f}", _speedup_of(model, exported)]
        lines.append(line)
    return columns, lines


def _ttft(model: Model) -> str:
    """Return the predicted TTFT with its interval."""
    headline = next((name for name in model.predicted if name.startswith("prefill")), None)
    if headline is None:
        return NONE
    ttft = model.predicted[headline]
    return f"{ttft['mean_ms']:.1f} [{ttft['low_ms']:.1f}, {ttft['high_ms']:.1f}]"


QUANTIZATION_COLUMNS = (
    "model",
    "float loss",
    "PTQ loss",
    "PTQ perplexity change",
    "QAT loss",
    "QAT perplexity change",
)


def quantization_rows(models: Sequence[Model]) -> list[list[str]]:
    """Return rows of text in the order of `QUANTIZATION_COLUMNS`, one for each exported model.

    Losses are those of float weights, of their program (PTQ) and of the program after
    quantization-aware training (QAT), on the same held-out tokens [nats a token]. Perplexity
    changes are relative to the float model with the same weights [%].
    """
    shown = {model.qat_exported.name for model in models if model.qat_exported is not None}
    unknown = [NONE, NONE]
    lines = []
    for model in models:
        if model.exported is None:
            continue
        plain, qat = model.exported.program_quality, model.qat_exported
        line = [model.title, f"{plain.change.float_loss:.3f}"]
        if not is_qat(model.trained):
            lines.append([
                *line,
                *_rounded(plain),
                *(_rounded(qat.program_quality) if qat else unknown),
            ])
        elif model.name not in shown:
            lines.append([*line, *unknown, *_rounded(plain)])
    return lines


def _rounded(quality: ProgramQuality) -> list[str]:
    return [f"{quality.change.loss:.3f}", f"{quality.change.perplexity_pct:+.1f} %"]


def as_text(models: Sequence[Model]) -> str:
    """Format the result table for terminals: long names are cut, empty columns are left out."""
    lines = [[_cut(name), *cells] for name, *cells in rows(models)]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    return table([[line[i] for i in kept] for line in [list(COLUMNS), *lines]])


def _cut(name: str) -> str:
    """Return a name of at most `_LONGEST_NAME` characters, without its middle if it is longer."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[: half - 1]}..{name[-half + 1 :]}"
