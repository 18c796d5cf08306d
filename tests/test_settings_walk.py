"""Every setting of every command: an illegal value is answered with the key that was typed."""

import dataclasses
import enum
import re
import typing
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flash.bundled import CONF
from flash.config import ROOTS, explain, load, register, schema_at
from flash.errors import InputError


def leaves(schema: type, path: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Key and type of every setting that holds a value and not a group."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{path}.{field.name}".lstrip(".")
        inner = schema_at(schema, [field.name])
        if inner is None:
            yield key, hints[field.name]
        elif type(None) not in typing.get_args(hints[field.name]):
            yield from leaves(inner, key)


def scalar(annotation: typing.Any) -> type | None:
    """The int, float, bool or Enum behind `X` or `X | None`; None for anything else."""
    options = [o for o in typing.get_args(annotation) if o is not type(None)] or [annotation]
    kind = options[0]
    known = isinstance(kind, type) and issubclass(kind, int | float | enum.Enum)
    return kind if len(options) == 1 and known else None


def answer(verb: str, cfg: DictConfig, key: str, value: object) -> str | None:
    """The error line for one value of a composed configuration, or None where it is legal."""
    changed = OmegaConf.create(cfg)
    OmegaConf.set_struct(changed, True)
    try:
        OmegaConf.update(changed, key, value)
        load(changed, ROOTS[verb])
    except InputError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return explain(error, ROOTS[verb])
    return None


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """The default configuration of each command."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FLASH_RUNS", str(tmp_path_factory.mktemp("runs")))
    patch.setenv("FLASH_VERB", "train")
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = {verb: compose(verb) for verb in ROOTS}
    yield found
    patch.undo()


CASES = [
    (verb, key, kind)
    for verb, schema in ROOTS.items()
    for key, annotation in leaves(schema)
    if (kind := scalar(annotation)) is not None
]


def test_the_walk_sees_all_commands():
    assert len(CASES) > 300
    assert {"device.lowering.group_size", "space.model_dim.step"} <= {key for _, key, _ in CASES}


@pytest.mark.parametrize(
    ("verb", "key", "kind"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_an_illegal_value_is_answered_with_its_own_key(composed, verb, key, kind):
    wrong: list[object] = ["wrong type"]
    if kind in (int, float):
        wrong += [-1, float("nan")] if kind is float else [-1]
    for value in wrong:
        said = answer(verb, composed[verb], key, value)
        if said is None:
            assert value != "wrong type", f"{key}={value} passes"
            assert key in ANY_SIGN, f"{key}={value} passes"
            continue
        assert "\n" not in said
        named = re.match(r"[\w.\[\]]+", said)
        assert named is not None
        assert named[0] == key, said


ANY_SIGN = {"suite.seed", "device.android.cool_below_c", "device.android.hot_above_c"}
"""Numbers that may be negative."""
