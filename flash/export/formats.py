"""Formats of an exported model besides the measured program: a Hugging Face folder, a GGUF file.

Each is written under a hidden name, tested in the program that will read it, and renamed only if
it passed.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from flash.arch import ArchSpec
from flash.errors import CheckFailed, InputError
from flash.export.settings import ExportFormat, FormatSettings
from flash.interop.gguf import (
    LIMITS,
    check_gguf,
    check_gguf_support,
    locate_gguf_failure,
    write_gguf,
)
from flash.interop.hf_folder import check_hf, transformers_spec, write_hf
from flash.lowering.parity_metrics import FormatCheck, ParityLimits
from flash.model.decoder import Decoder
from flash.model.tokenizer import ModelTokenizer
from flash.records import convert, find_json, write_json
from flash.renamed import present_keys

log = logging.getLogger(__name__)


FILES = {
    ExportFormat.executorch: "model.pte",
    ExportFormat.hf: "hf",
    ExportFormat.gguf: "model.gguf",
}


@dataclass(frozen=True)
class FormatResult:
    """Published file or folder of one format; stored next to it as `hf.json` or `gguf.json`.

    Attributes:
        check: Result of the format's gate.
        size_bytes: Size of the file, or of all files in the folder.
        key: Hash of all inputs and settings that affect the file.
    """

    check: FormatCheck
    size_bytes: int
    key: str

    @classmethod
    def read(cls, folder: Path, kind: ExportFormat) -> "FormatResult | None":
        """Read the result of a format from an export's folder; None if the format was not written.

        Raises:
            InputError: The file is damaged.
        """

        def build(values: Any) -> "FormatResult":
            found = convert(dict[str, Any], values)
            if isinstance(found.get("check"), dict):
                found["check"] = present_keys(found["check"])
            return convert(cls, found)

        return find_json(folder / f"{kind.value}.json", build, "export again")


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """Source of the formats: the model, its tokenizer and a text to test them on.

    Attributes:
        model: The decoder in float32.
        text: Held-out token ids on which the formats are compared with the model.
        tokenizer: Tokenizer of the model.
        metadata: Facts about the weights that an hf folder keeps.
    """

    model: Decoder
    text: Int[Tensor, " n"]
    tokenizer: ModelTokenizer
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_formats(
    formats: Sequence[ExportFormat],
    settings: FormatSettings,
    spec: ArchSpec,
    tokenizer: ModelTokenizer,
) -> None:
    """Check that each format can express `spec` and that its gate can run; loads no weights.

    Raises:
        InputError: A format cannot express it, or its gate needs a package that is not installed.
    """
    if ExportFormat.hf in formats:
        transformers_spec(spec)
    if ExportFormat.gguf in formats:
        try:
            check_gguf_support(spec, tokenizer if settings.gguf_tokenizer else None)
        except InputError as error:
            raise InputError(f"format=gguf: {error}") from error


def find_published(kind: ExportFormat, folder: Path, key: str) -> FormatResult | None:
    """Return the result of a format that was published with this key, or None.

    Raises:
        InputError: The file of the result is damaged.
    """
    found = FormatResult.read(folder, kind)
    done = found is not None and found.key == key and (folder / FILES[kind]).exists()
    return found if done else None


def publish(
    kind: ExportFormat, folder: Path, source: ExportSource, settings: FormatSettings, key: str
) -> FormatResult:
    """Write one format into an export's folder, or return its result if `key` is unchanged.

    Raises:
        CheckFailed: The outputs of the file differ from the model's. No file is published, and an
            earlier one is kept.
    """
    path, found = folder / FILES[kind], find_published(kind, folder, key)
    if found is not None:
        log.info("%s is finished: %s", kind.value, path)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    unproven = folder / f".unproven.{path.name}"
    try:
        check = _WRITERS[kind](unproven, source, settings)
        if not check.passed:
            part = f" in {check.worst_layer}" if check.worst_layer else ""
            raise CheckFailed(
                f"{folder.name}: the gate of format {kind.value} failed{part}; nothing was "
                f"published\n{check}"
            )
        size = sum(file.stat().st_size for file in _files(unproven))
        _remove(path)
        (folder / f"{kind.value}.json").unlink(missing_ok=True)  # describes the former one
        unproven.rename(path)
    finally:
        _remove(unproven)
    result = FormatResult(check, size, key)
    write_json(folder / f"{kind.value}.json", result)
    return result


def _write_hf(path: Path, source: ExportSource, settings: FormatSettings) -> FormatCheck:
    write_hf(path, source.model, tokenizer=source.tokenizer, metadata=source.metadata)
    return check_hf(path, source.model, source.text, settings.max_error_hf)


def _write_gguf(path: Path, source: ExportSource, settings: FormatSettings) -> FormatCheck:
    write_gguf(
        path,
        source.model,
        tokenizer=source.tokenizer if settings.gguf_tokenizer else None,
        weight_format=settings.gguf,
    )
    check = check_gguf(path, source.model, source.text, _gguf_limits(settings))
    if check.passed:
        return check
    where = locate_gguf_failure(
        source.model, source.text, _gguf_limits(settings), settings.gguf, folder=path.parent
    )
    return dataclasses.replace(check, worst_layer=where)


_WRITERS: dict[ExportFormat, Callable[[Path, ExportSource, FormatSettings], FormatCheck]] = {
    ExportFormat.hf: _write_hf,
    ExportFormat.gguf: _write_gguf,
}


def _gguf_limits(settings: FormatSettings) -> ParityLimits:
    """Return the limits of a GGUF file: the user's, or else those of its weight format."""
    given = {"max_kl": settings.max_kl_gguf, "min_agreement": settings.min_agreement_gguf}
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(LIMITS[settings.gguf], **changes)


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
