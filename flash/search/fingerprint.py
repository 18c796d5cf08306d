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
    # Studies that were made before there were these choices have none of the keys.
    if not space.per_layer:
        del settings["ffn_dim"]["per_layer"]
    for key in ("num_heads", "num_kv_heads", "vocab_size"):
        if settings[key] is None:
            del settings[key]
    return {"space": settings, "backbone_arch": space.base.to_dict()}


def check_fingerprint(
    key: str, name: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str
) -> None:
    """Compare a stored fingerprint with the current one, key by key.

    Args:
        key: Setting that names the study.
        name: Name of the study.
        stored: Fingerprint with which the study was created.
        wanted: Fingerprint of the current settings.
        remedy: End of the error.

    Raises:
        InputError: The fingerprints differ; the message lists every differing key.
    """
    old, new = _flat(stored), _flat(plain(wanted))  # tuples come back as lists
    differing = [
        f"{each} (was {shown(old.get(each))}, is now {shown(new.get(each))})"
        for each in sorted(old.keys() | new.keys())
        if old.get(each) != new.get(each)
    ]
    if differing:
        raise InputError(
            f"{key}={name}: expected the settings that the study was made with, but these differ: "
            f"{'; '.join(differing)}; {remedy}"
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
