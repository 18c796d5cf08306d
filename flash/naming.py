"""Names of results: the base, such as an architecture, and what was changed of the defaults.

A name follows from the configuration alone, so that the same command has the same result and
another one has another. It needs no quotes in a shell or in an override of Hydra.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from flash.compat.hydra import Job, compose, overrides_of_groups
from flash.errors import InputError, shown
from flash.paths import name_of_model
from flash.records import digest, plain
from flash.training.settings import TRAINER_UNCOUNTED

_UNCOUNTED = {
    *("name", "runs", "logger", "overwrite", "backbone.name", "recipe.name", "start", "model"),
    *("data.name", "data.workers", "data.skip_damaged"),
    *(f"trainer.{name}" for name in TRAINER_UNCOUNTED),
}
"""Settings that have no part in a name."""
_NO_TRAINING = {f"trainer.{name}" for name in ("max_steps", "spike_factor", "on_spike")}
_UNCOUNTED_OF: dict[str, set[str]] = {
    "train": set(),
    # Each format has files of its own, and so has each suite.
    "export": {"format", *_NO_TRAINING},
    "evaluate": {"format", "device", "batch_size", *_NO_TRAINING},
}
"""Further such settings of each command that has names."""
_OF_SHAPES = ("arch", "backbone")
"""Settings that name a measurement with random weights; its file knows the others."""

_LONGEST_BASE = 96
_LONGEST_NAME = 64
_LONGEST_VALUE = 24


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted paths; lists count as values."""
    if not isinstance(values, Mapping):
        return {path: plain(values)}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{path}.{key}".lstrip(".")))
    return flat


def is_under(path: str, keys: Iterable[str]) -> bool:
    """Return True if the dotted `path` is one of `keys` or below one."""
    return any(path == key or path.startswith(f"{key}.") for key in keys)


def changes(
    default: Mapping[str, Any], chosen: Mapping[str, Any], uncounted: Iterable[str]
) -> dict[str, Any]:
    """Return the values of `chosen` that differ from `default`, by dotted path.

    Args:
        default: Nested values of a configuration.
        chosen: Nested values of another one; what only `default` has counts as null.
        uncounted: Dotted keys that do not count, each with all below it.
    """
    before, after = flatten(default), flatten(chosen)
    missing = dict.fromkeys(before.keys() - after.keys())
    return {
        path: value
        for path, value in sorted({**after, **missing}.items())
        if not is_under(path, uncounted) and (path not in before or before[path] != value)
    }


def name_of_path(path: str) -> str:
    """Return `name_of_model` as a part of a name."""
    name = _safe(name_of_model(path))
    return name if len(name) <= _LONGEST_BASE else f"{name[:_LONGEST_BASE]}_{digest(name, 4)}"


def compose_name(
    base: str, options: Iterable[str], changed: Mapping[str, Any], paths: Collection[str] = ()
) -> str:
    """Return the name of a result.

    Args:
        base: Name of the architecture, model or backbone.
        options: Names of the chosen options that are not the defaults.
        changed: Further values that are not the defaults, by dotted path.
        paths: All paths of the configuration; a value is named by the last keys that are its own.

    Returns:
        Parts joined by `-`, those of the architecture first, such as `tiny-ffn_dim_384-continue`.
        A name of more than 64 characters has the hash of all parts in place of those that are too
        many.
    """
    shapes, others = [], []
    for path, value in sorted(changed.items()):
        part = _part(_short(path, paths), value)
        (shapes if is_under(path, ["arch"]) else others).append(part)
    parts = [base, *shapes, *map(_safe, options), *others]
    name = "-".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    kept, end = base, f"-{digest(parts, 8)}"
    for part in parts[1:]:
        if len(f"{kept}-{part}{end}") > _LONGEST_NAME:
            break
        kept = f"{kept}-{part}"
    return f"{kept}{end}"


def _short(path: str, paths: Iterable[str]) -> str:
    """Return the last keys of `path` that no other of `paths` ends with."""
    keys = path.split(".")
    for count in range(1, len(keys)):
        end = ".".join(keys[-count:])
        if not any(other != path and f".{other}".endswith(f".{end}") for other in paths):
            return end
    return path


def _part(key: str, value: Any) -> str:
    text = _text(value)
    if key.rpartition(".")[2] == "name":
        return text  # says by itself what it is
    return f"{_safe(key)}_{text}"


def _text(value: Any) -> str:
    """Return the value as a part of a name; the hash of the value if it makes no good one.

    Paths to the same place have the same name.
    """
    if isinstance(value, str) and "/" in value:
        return f"{name_of_path(value)}_{digest(str(Path(value).resolve()), 4)}"
    named = value is None or isinstance(value, bool)
    text = json.dumps(value) if named else str(value)
    safe = _safe(text)
    return safe if safe == text and 0 < len(text) <= _LONGEST_VALUE else digest(value, 6)


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]+|^[.-]", "_", text, flags=re.ASCII)


def complete_names(verb: str, job: Job) -> None:
    """Set the names in the configuration of a job that nobody has given.

    The backbone has the name of its folder if an override gives other weights. The result has a
    name for `train`, `export` and `evaluate`: a base, and what the overrides change. The base is
    the option of the group `arch`, else the model that the command starts from, else the backbone.

    Args:
        verb: Name of the command.
        job: Job whose configuration is changed.
    """
    config = job.config
    if "backbone" not in config:
        return
    chosen = compose(verb, overrides_of_groups(job, job.choices))
    weights, named = config.backbone.weights, config.backbone.name != chosen.config.backbone.name
    if weights is not None and weights != chosen.config.backbone.weights and not named:
        config.backbone.name = name_of_path(weights)
    if verb not in _UNCOUNTED_OF:
        return
    given = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))["name"]
    if given is None:
        default = compose(verb, overrides_of_groups(job, {"arch", "experiment"}))
        config.name = _result_name(verb, job, default, chosen)
    else:  # omegaconf puts in a choice as `CacheFormat.fp32`
        values = lambda found: shown(OmegaConf.select(config, found[1]))  # noqa: E731
        config.name = re.sub(r"\$\{([\w.]+)\}", values, given)


def require_own_names(verb: str, jobs: Sequence[Any]) -> None:
    """Check that the jobs of a sweep have results of different names.

    Args:
        verb: Name of the command.
        jobs: Settings of each job.

    Raises:
        InputError: Two have the same; names it.
    """
    if verb not in _UNCOUNTED_OF:
        return
    seen = set()
    for job in jobs:
        files = {"export": "format", "evaluate": "suite"}.get(verb)
        name = (job.name, repr(getattr(job, files)) if files else None)
        if name in seen:
            raise InputError(
                f"name={job.name}: expected a name for each of the {len(jobs)} jobs, but two "
                "would have this one; leave name out, or put what they differ in into it, as in "
                "'name=narrow_${arch.ffn_dim}'"
            )
        seen.add(name)


def _result_name(verb: str, job: Job, default: Job, chosen: Job) -> str:
    """Return the name of a result.

    Args:
        verb: Name of the command.
        job: The job.
        default: The job without other options than those of `arch` and `experiment`.
        chosen: The job with its options, but with their values.
    """
    values, uncounted = _values(job), {*_UNCOUNTED, *_UNCOUNTED_OF[verb]}
    changed = changes(_values(chosen), values, {*uncounted, "backbone.weights"})
    arch, backbone = job.choices.get("arch"), job.config.backbone.name
    source = values.get("start") or values.get("model")
    if source == "random":
        changed = {path: value for path, value in changed.items() if is_under(path, _OF_SHAPES)}
        return compose_name(arch or backbone, [], changed, flatten(values))
    base = arch or (backbone if source is None else name_of_path(source))
    parts = _options(job, default, changes(_values(default), _values(chosen), uncounted))
    if base != backbone and backbone != default.config.backbone.name:
        parts["backbone"] = backbone
    if verb == "train":
        further = values["start"] is not None
        if further or (arch is None and not values["arch"]):
            parts["recipe"] = str(job.choices["recipe"])  # distinguishes it from what it starts as
        base = f"{base}-then" if further else base
    if f"-{backbone}-" in f"-{base}-":
        parts.pop("backbone", None)
    return compose_name(base, [parts[key] for key in sorted(parts)], changed, flatten(values))


def _options(job: Job, default: Job, changed: Collection[str]) -> dict[str, str]:
    """Return the options of the job that have changed a value, by group."""
    found = {
        group: option
        for group, option in job.choices.items()
        if option is not None
        and option != default.choices.get(group)
        and any(is_under(path, [group.rpartition("@")[2]]) for path in changed)
    }
    for group in ("backbone", "suite"):  # the base or a part of its own; a part of the file's name
        found.pop(group, None)
    experiment = job.choices.get("experiment")
    return {**found, **({} if experiment is None else {"experiment": experiment})}


def _values(job: Job) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(job.config, resolve=True))
