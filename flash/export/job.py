"""Job of an export: its settings, and the inputs that are opened and checked before any work."""

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flash.arch import ArchSpec, count_parameters
from flash.device.base import Device
from flash.device.program_limits import ProgramLimits
from flash.errors import InputError, require
from flash.export.formats import FILES, FormatResult, check_formats
from flash.export.mixed import check_mixed
from flash.export.result import ExportResult, device_conditions, exports
from flash.export.rounding import RoundingChoice, warn_of_other_rounding
from flash.export.settings import ExportFormat, ExportSettings, FormatSettings
from flash.lowering.settings import LoweringSettings
from flash.model.backbone import Backbone
from flash.paths import Runs
from flash.prune.importance import fingerprint
from flash.records import digest, plain
from flash.rounding.calibration import check_calibration
from flash.training.checkpoints import find_checkpoint
from flash.workspace import Workspace, result_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportJob:
    """Export whose inputs are open; no weights are loaded yet.

    Attributes:
        settings: Settings of `export.py`.
        name: Name of the result.
        spec: Architecture of the weights.
        weights: The checkpoint folder.
        workspace: Backbone, tokenizer, text, and the device of the measurement.
    """

    settings: ExportSettings
    name: str
    spec: ArchSpec
    weights: Path
    workspace: Workspace

    @classmethod
    def open(cls, settings: ExportSettings, runs: Runs) -> "ExportJob":
        """Open the job and find its weights; text and device are opened at their first use.

        Raises:
            InputError: Weights or device settings cannot be used.
        """
        backbone = Backbone.open(settings.backbone)
        name = result_name(settings)
        spec, weights = find_checkpoint(settings, name, backbone, runs)
        own = weights / "tokenizer.json"
        if own.is_file() and settings.data.tokenizer is None:
            data = dataclasses.replace(settings.data, tokenizer=str(own))
            settings = dataclasses.replace(settings, data=data)
        workspace = Workspace(
            runs=runs,
            backbone=backbone,
            data_settings=settings.data,
            device_settings=settings.device,
            model_folder=weights,
            seed=settings.seed,
        )
        return cls(settings, name, spec, weights, workspace)

    @cached_property
    def reference(self) -> ExportResult | None:
        """Result of the backbone, whose program alternates with the new one while both are timed.

        None if this is the backbone, or if there is no such program for the device.
        """
        backbone = self.workspace.backbone
        if self.spec == backbone.spec:
            return None
        return _reference(self.workspace.runs, backbone, self.device)

    @property
    def lowering(self) -> LoweringSettings:
        """Formats and lengths of the program."""
        return self.settings.device.lowering

    @cached_property
    def rounding(self) -> RoundingChoice:
        """Rounding of the weights of the program."""
        return RoundingChoice.of(self.settings.device.lowering, self.weights)

    @property
    def calibration(self) -> Tensor:
        """Token ids of training text `(n, seq_len)` for the rounding."""
        tokens = self.settings.device.lowering.calibration_tokens
        return torch.cat(list(self.workspace.data.calibration_batches(tokens)))

    @cached_property
    def keys(self) -> dict[ExportFormat, str]:
        """For each format a hash of all inputs and settings that affect its result."""
        return _keys(self.settings, self.weights, self.workspace, self.rounding)

    @property
    def device(self) -> Device:
        """Device on which the program is measured."""
        return self.workspace.device

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.workspace.runs.export(self.name)

    @property
    def key(self) -> str:
        """Hash of all inputs and settings that affect the program and its measurement."""
        return self.keys[ExportFormat.executorch]

    @property
    def texts(self) -> list[Tensor]:
        """Held-out sequences, of about `perplexity_tokens` in total; each fits the cache."""
        length = min(self._text_limits.values())
        count = max(1, self.settings.perplexity_tokens // length)
        sequences = self.workspace.data.validation_set
        return [sequences[i].tokens[:length] for i in range(min(count, len(sequences)))]

    @property
    def _text_limits(self) -> dict[str, int]:
        """Settings that limit the length of the held-out sequences [tokens]."""
        settings = self.settings
        return {
            "data.seq_len": settings.data.seq_len,
            "device.lowering.max_context": settings.device.lowering.max_context,
            "perplexity_tokens": settings.perplexity_tokens,
        }

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt that the program continues; `begin_id` if it has none."""
        return self.workspace.tokenizer.encode(self.settings.prompt) or [self.begin_id]

    @property
    def begin_id(self) -> int:
        """Token that begins a text; end-of-text for models without one."""
        tokenizer = self.workspace.tokenizer
        return tokenizer.begin if tokenizer.begin is not None else tokenizer.end_of_text

    def check_settings(self) -> None:
        """Check what can be checked without the device and without reading the text.

        Raises:
            InputError: No format is given, the device's settings do not fit the architecture, the
                text is missing, or a stored result is damaged.
        """
        settings = self.settings
        require(bool(settings.format), "format", "[]", "some of executorch, hf, gguf")
        if ExportFormat.executorch in settings.format:
            lowering = settings.device.lowering
            lowering.check_fits(self.spec)
            if self.rounding.calibrated(lowering):
                key = "device.lowering.calibration_tokens"
                check_calibration(key, lowering.calibration_tokens, self.spec)
            check_mixed(settings.mixed, settings.device, self.spec)
        self.workspace.check_data()
        for kind in settings.format:
            self._stored(kind)

    def check(self) -> None:
        """Check before any work that the export can succeed.

        Raises:
            InputError: As `check_settings`; or a format cannot express the architecture, a gate
                cannot run, a finished export would be overwritten, or the disk is too full.
        """
        self.check_settings()
        settings = self.settings
        settings.gate.check_fits(self._text_limits)
        if ExportFormat.executorch in settings.format:
            self._check_prompt()
            warn_of_other_rounding(self.name, settings.device.lowering, self.weights)
        tokenizer = self.workspace.tokenizer
        check_formats(settings.format, settings.formats, self.spec, tokenizer)
        self.check_kept()
        self._check_room()

    def check_kept(self) -> None:
        """Check that no finished export would be replaced.

        Raises:
            InputError: One would be.
        """
        for kind in self.settings.format:
            self._keep(kind)

    def _check_prompt(self) -> None:
        limit, new = self.settings.device.lowering.max_context, self.settings.new_tokens
        room = limit - len(self.prompt)
        require(
            new <= room,
            "new_tokens",
            new,
            f"at most {room}, which device.lowering.max_context={limit} leaves after the "
            f"{len(self.prompt)} tokens of the prompt",
        )

    def _stored(self, kind: ExportFormat) -> ExportResult | FormatResult | None:
        program = kind is ExportFormat.executorch
        return ExportResult.read(self.folder) if program else FormatResult.read(self.folder, kind)

    def _keep(self, kind: ExportFormat) -> None:
        found = self._stored(kind)
        if found is None or found.key == self.keys[kind] or self.settings.overwrite:
            return
        raise InputError(
            f"{self.folder / FILES[kind]}: holds an export of other weights or settings; "
            "overwrite=true replaces it, name=NEW keeps both"
        )

    def _check_room(self) -> None:
        floats = 4 * count_parameters(self.spec).total
        sizes = {ExportFormat.executorch: self.settings.device.lowering.weight_bytes(self.spec)}
        needed = sum(sizes.get(kind, floats) for kind in self.settings.format)
        root = self.workspace.runs.root
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        require(
            free > needed,
            "runs",
            f"{root} with {free / 2**20:.1f} MiB free",
            f"at least {needed / 2**20:.1f} MiB for {self.name}; make room or give runs=FOLDER",
        )


def _reference(runs: Runs, backbone: Backbone, device: Device) -> ExportResult | None:
    """Find the backbone's program for this device.

    One with the same settings comes first, then the one with the backbone's name.
    """
    settings = device.settings
    conditions, needed = device_conditions(device, settings), settings.workload.context
    found = [
        result
        for result in exports(runs)
        if result.spec == backbone.spec and result.device == device.identity()
    ]
    same = [result for result in found if result.conditions == conditions]
    named = [result for result in found if result.name == backbone.name]
    for result in [*same, *named]:
        path = runs.export(result.name) / "model.pte"
        limits = ProgramLimits.find(path)
        if limits is None or limits.context >= needed:
            return result
        log.warning(
            "%s: no speedup over it, as its context of %d tokens is less than the workload's %d; "
            "export the backbone again",
            path,
            limits.context,
            needed,
        )
    return None


def _keys(
    settings: ExportSettings,
    weights: Path,
    workspace: Workspace,
    rounding: RoundingChoice,
) -> dict[ExportFormat, str]:
    text = [workspace.data.identity, settings.perplexity_tokens]
    tokenizer = workspace.tokenizer
    source = {
        "weights": fingerprint(weights),
        "data": text,
        "tokenizer": [tokenizer.token_ids, tokenizer.chat_template],
    }
    program = {
        "device": workspace.device.identity(),
        "device_settings": settings.device.identity(),
        "rounding": rounding.identity(settings.device.lowering),
        "mixed": None if settings.mixed.off else plain(settings.mixed),
        "gate": plain(settings.gate),
        "precision": settings.trainer.precision.value,
        "text": [settings.prompt, settings.new_tokens],
        "reference": None,  # once its key, which made exports depend on what else was exported
    }
    # Each other format has been keyed by the settings of all; those of the others count as default.
    given, default = settings.formats, FormatSettings()
    hf = dataclasses.replace(default, max_error_hf=given.max_error_hf)
    gguf = dataclasses.replace(given, max_error_hf=default.max_error_hf)
    own = {
        ExportFormat.executorch: program,
        ExportFormat.hf: {"formats": plain(hf)},
        ExportFormat.gguf: {"formats": plain(gguf)},
    }
    return {kind: digest({**source, **own[kind]}) for kind in ExportFormat}
