"""Safetensors files of results that can be made again, with a hash of their tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flash.errors import InputError
from flash.records import atomic_write

_SEAL = "sha256"


def write_tensors(
    path: Path, tensors: dict[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically, with a hash of them.

    Args:
        path: File to write.
        tensors: Tensors by name.
        about: Further facts to store.
    """
    with atomic_write(path) as file:
        file.write(save(tensors, {**(about or {}), _SEAL: _hash(tensors)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors, and the facts stored with them.

    Raises:
        InputError: The file is damaged, or its tensors are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
    seal = about.pop(_SEAL, None)  # files of former versions have none
    if seal is not None and seal != _hash(tensors):
        raise InputError(f"{path}: damaged (its values are not those that were written)")
    return tensors, about


def _hash(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()
