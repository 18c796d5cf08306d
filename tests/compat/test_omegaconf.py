"""Contract tests of OmegaConf for flash.compat.omegaconf."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.compat.contract import contract


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    empty: Inner | None = None
    missing: Inner = MISSING
    rows: list[Inner] = field(default_factory=list)


def test_children_are_seen_without_being_resolved():
    with contract(
        "omegaconf's DictConfig._get_node, _is_none or _is_missing",
        "flash.compat.omegaconf.child_mapping",
        "walk a configuration that is not complete",
    ):
        from flash.compat.omegaconf import child_mapping

        node = OmegaConf.structured(Outer)
        child = child_mapping(node, "inner")
        assert child is not None
        assert list(child) == ["size"]
        assert child_mapping(node, "empty") is None
        assert child_mapping(node, "missing") is None
        assert child_mapping(node, "rows") is None
        plain = OmegaConf.create({"there": {"a": 1}, "elsewhere": "${nowhere}"})
        assert child_mapping(plain, "there") == {"a": 1}
        assert child_mapping(plain, "elsewhere") is None


def test_an_interpolation_is_shown_as_it_is_written():
    with contract(
        "omegaconf's Node._value or ListConfig._metadata.element_type",
        "flash.compat.omegaconf.interpolation and kind_of_items",
        "tell what stands in the place of settings",
    ):
        from flash.compat.omegaconf import interpolation, kind_of_items

        node = OmegaConf.structured(Outer)
        node.inner = "${empty}"
        assert interpolation(node, "inner") == "${empty}"
        assert kind_of_items(node.rows) is Inner
        assert kind_of_items(OmegaConf.create({"a": 1})) is None


def test_errors_know_their_key():
    with contract(
        "omegaconf's OmegaConfBaseException.full_key, .key or .object_type",
        "flash.compat.omegaconf.error_key",
        "name the key that an error is about",
    ):
        from flash.compat.omegaconf import error_key, error_schema

        node = OmegaConf.structured(Outer)
        with pytest.raises(OmegaConfBaseException) as wrong:
            node.inner.size = "many"
        assert (error_key(wrong.value), error_schema(wrong.value)) == ("inner.size", Inner)
        with pytest.raises(OmegaConfBaseException) as unknown:
            OmegaConf.update(node, "inner.width", 1)
        assert (error_key(unknown.value), error_schema(unknown.value)) == ("inner.width", Inner)
        with pytest.raises(OmegaConfBaseException) as item:
            OmegaConf.merge(node, {"rows": [{"width": 1}]})
        assert (error_key(item.value), error_schema(item.value)) == ("width", Inner)
        assert error_key(OmegaConfBaseException("x")) == ""


def test_overrides_of_null_are_merged():
    with contract(
        "omegaconf's OmegaConf.update, split_key or DictConfig.merge_with",
        "flash.compat.omegaconf.accept_overrides_of_null",
        "take overrides of a mapping that is null",
    ):
        from flash.compat.omegaconf import accept_overrides_of_null

        accept_overrides_of_null()
        node = OmegaConf.structured(Outer)
        OmegaConf.update(node, "empty.size", 2)
        assert node.empty == Inner(2)
        OmegaConf.update(node, "empty", None)
        assert node.empty is None
        OmegaConf.update(node, "empty", {"size": 3})
        assert node.empty == Inner(3)
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.update(OmegaConf.structured(Outer), "empty", {"width": 1})


def test_the_modules_that_settings_need_import_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, flash.compat.hydra, flash.compat.omegaconf, flash.compat.submitit;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
