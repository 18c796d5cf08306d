"""The program that was exported of given weights."""

from pathlib import Path

from flash.arch import ArchSpec
from flash.commands import command
from flash.errors import InputError
from flash.export.result import ExportResult, exports
from flash.paths import Runs
from flash.prune.importance import fingerprint


def find_program(runs: Runs, name: str, spec: ArchSpec, weights: Path) -> Path:
    """Return the path of the program exported from these weights.

    Args:
        runs: Folder of results.
        name: Name of an export, or of an evaluation that is named after one.
        spec: Architecture of the weights.
        weights: Checkpoint folder.

    Raises:
        InputError: There is none, or it was made of another architecture or other weights.
    """
    return program_of(export_folder(runs, name, weights), spec, weights)


def program_of(folder: Path, spec: ArchSpec, weights: Path) -> Path:
    """Return the path of the program exported from these weights.

    Raises:
        InputError: There is no program, or it has another architecture or other weights.
    """
    path = folder / "model.pte"
    exported = ExportResult.read(folder)
    if exported is None or not path.is_file():
        raise InputError(
            f"format=program: expected {path}, found none; run {command('export')} with the "
            "same +arch first"
        )
    if exported.spec != spec:
        raise InputError(
            f"format=program: {path} is of arch {exported.spec}: expected {spec}; export it again"
        )
    if exported.weights not in ("", fingerprint(weights)):
        raise InputError(
            f"format=program: {path} was made of other weights than {weights}: export it again "
            f"({command('export')} overwrite=true), or give model=FOLDER of those that it was made "
            "of"
        )
    return path


def export_folder(runs: Runs, name: str, weights: Path) -> Path:
    """Return the folder of the export of these weights that the evaluation is named after.

    The name of an evaluation is that of the export with what is asked, as in `NAME-limit_10`.

    Raises:
        InputError: It is named after none of several.
    """
    folder = runs.export(name)
    if (folder / "export.json").is_file():
        return folder
    found = [result.name for result in exports(runs) if result.weights == fingerprint(weights)]
    if named := [each for each in found if name.startswith(f"{each}-")]:
        return runs.export(max(named, key=len))
    if len(found) > 1:
        raise InputError(
            f"format=program: expected one export of {weights}, found {', '.join(found)}; give "
            "name=NAME"
        )
    return runs.export(found[0]) if found else folder
