"""Checkpoints of trained models, found by name, folder or architecture."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flash.arch import ArchSpec
from flash.commands import command
from flash.errors import InputError, nearest
from flash.model.backbone import Backbone
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.training.result import TrainResult
from flash.workspace import arch_of

log = logging.getLogger(__name__)


class ChoosesModel(Protocol):
    """Settings of a command that reads a trained model."""

    arch: dict[str, Any]
    model: str | None


def checkpoint_folder(key: str, model: str, runs: Runs) -> Path:
    """Return the checkpoint folder that a setting names.

    Args:
        key: Name of the setting, for errors.
        model: Name of a training in `runs`, or a folder.
        runs: Layout of the folder of results.

    Raises:
        InputError: There is neither.
    """
    trained = {path.parent.name: path for path in (runs.root / "models").glob("*/checkpoint")}
    if model in trained:  # a folder of that name is `./NAME`
        return trained[model]
    folder = Path(model)
    if folder.is_dir():
        return folder
    hint = nearest(model, trained) if trained else f"none in {runs.root / 'models'} yet"
    raise InputError(
        f"{key}={model}: expected the folder of a trained checkpoint, or the name of a training "
        f"({hint})"
    )


def checkpoint_spec(key: str, folder: Path) -> ArchSpec:
    """Read the architecture of a checkpoint folder, and check its tensors' names and shapes.

    Args:
        key: Name of the setting that chose the folder, for errors.
        folder: The folder.

    Raises:
        InputError: A file or a tensor is missing, damaged or of another shape.
    """
    return Backbone.open(BackboneSettings(name=key, weights=str(folder))).spec


def trained_models(runs: Runs) -> Iterator[TrainResult]:
    """Iterate over the results of all trainings with saved weights; damaged ones are skipped."""
    for path in sorted((runs.root / "models").glob("*/result.json")):
        try:
            result = TrainResult.read(path.parent)
        except InputError as error:
            log.warning("%s", error)
            continue
        if result is not None and (path.parent / "checkpoint").is_dir():
            yield result


def find_checkpoint(
    settings: ChoosesModel, name: str, backbone: Backbone, runs: Runs
) -> tuple[ArchSpec, Path]:
    """Return the architecture and the checkpoint folder of the model that a command reads.

    It is that of the setting `model`; else the backbone's own if `arch` changes nothing; else the
    training with the name of the result or the first part of it; else the only training of this
    architecture.

    Args:
        settings: Settings of the command.
        name: Name of the command's result.
        backbone: Backbone; it is downloaded if its own weights are used.
        runs: Layout of the folder of results.

    Raises:
        InputError: There is no such checkpoint, there are several, or it has another architecture
            than `arch` says.
    """
    if settings.model is not None:
        folder = checkpoint_folder("model", settings.model, runs)
        found = checkpoint_spec("model", folder)
        if settings.arch and found != arch_of(settings.arch, backbone):
            raise InputError(
                f"model={settings.model}: holds arch {found}: expected "
                f"{arch_of(settings.arch, backbone)}, as +arch says; leave +arch out"
            )
        return found, folder
    spec = arch_of(settings.arch, backbone)
    if spec == backbone.spec and backbone.folder is not None:
        backbone.fetch()
        return spec, backbone.folder
    folder = _trained_with(spec, name, runs)
    found = checkpoint_spec("model", folder)
    if found != spec:
        raise InputError(
            f"{folder}: holds arch {found}: expected {spec}; give the model=NAME that it was "
            "trained under, or train it"
        )
    return spec, folder


def _trained_with(spec: ArchSpec, name: str, runs: Runs) -> Path:
    own = runs.model(name) / "checkpoint"
    if own.is_dir():
        return own
    names = [result.name for result in trained_models(runs) if result.spec == spec]
    beginnings = [each for each in names if name.startswith(f"{each}-")]
    if not names:
        raise InputError(
            f"model=null: expected trained weights in {own}; run {command('train')} with the same "
            "+arch first, or give model=FOLDER"
        )
    if len(names) > 1 and not beginnings:
        raise InputError(
            f"model=null: expected one training of this architecture, found {', '.join(names)}; "
            "give model=NAME"
        )
    chosen = max(beginnings, key=len) if beginnings else names[0]
    log.info("%s: weights of the training %s", name, chosen)
    return runs.model(chosen) / "checkpoint"
