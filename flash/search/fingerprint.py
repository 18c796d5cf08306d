"""Fingerprints: the settings that must agree for the results of a study to be comparable."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flash.arch import SearchSpace
from flash.errors import InputError, shown
from flash.records import plain


def space_fingerprint(space: SearchSpace) -> dict[str, Any]:
    """Return the part of a fingerprint that describes the search space and its backbone."""
    settings = asdict(space.settings)
    settings["kinds"] = [kind.value for kind in space.kinds]
    del settings["name"]  # renaming a space changes no result
    return {"space": settings, "backbone_arch": space.base.to_dict()}


def check_fingerprint(
    name: str, storage: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Compare a stored fingerprint with the current one, key by key.

    Args:
        name: Name of the study.
        storage: Location of the study, as shown to users.
        stored: Fingerprint with which the study was created.
        wanted: Fingerprint of the current settings.

    Raises:
        InputError: The fingerprints differ; the message lists every differing key.
    """
    old, new = _flat(stored), _flat(plain(wanted))  # tuples come back as lists
    differing = [
        f"{key} (was {shown(old.get(key))}, is now {shown(new.get(key))})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise InputError(
            f"search.study={name}: expected the settings that the study was made with, but these "
            f"differ: {'; '.join(differing)}; choose another search.study or delete {storage}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
