"""OmegaConf: access to nodes without resolving them, and the keys of errors.

Names that OmegaConf 2.3 does not document, and the reasons to use them:

- `DictConfig._get_node`, `Node._is_none`, `Node._is_missing` and `Node._value`: public access
  raises for missing values and resolves interpolations; the check for unknown keys must do neither.
- `OmegaConfBaseException.full_key`, `.key` and `.object_type`: locate an error in the
  configuration, so that a message can name the key.
- `OmegaConf.update`, which Hydra calls for each override, and `split_key`: `update` fails for a
  mapping that is null, and for a key within one; `merge_with` from the root does not.
- `ListConfig._metadata.element_type`: a list of numbers takes lists and mappings, too.
- `get_yaml_loader`: option files are checked before Hydra composes them, by the same rules for
  numbers, dates and duplicate keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader, split_key
from omegaconf.errors import OmegaConfBaseException


def load_yaml(text: str) -> Any:
    """Parse YAML by the rules of OmegaConf, whose loader is a safe one.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    loader = get_yaml_loader()(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def child_mapping(node: DictConfig, key: str) -> DictConfig | None:
    """Return the mapping below `key`; None if the value is null, missing or no mapping."""
    child = node._get_node(key)
    if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
        return None
    return child


def child_containers(
    node: DictConfig | ListConfig,
) -> Iterator[tuple[str | int, DictConfig | ListConfig]]:
    """Iterate over (key, child) for children that are mappings or lists; a list has indices.

    Null and missing children are skipped.
    """
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child = node._get_node(key)
        known = isinstance(child, DictConfig | ListConfig)
        if known and not child._is_none() and not child._is_missing():
            yield key if isinstance(key, int) else str(key), child


def resolved(node: DictConfig | ListConfig, key: str | int) -> Any:
    """Return the value at `key`, that of another place for an interpolation."""
    return node[key]  # pyright: ignore[reportArgumentType, reportCallIssue]


def interpolation(node: DictConfig | ListConfig, key: str | int) -> str:
    """Return the interpolation at `key` as it is written, such as `${device.workload}`."""
    child = node._get_node(key)  # pyright: ignore[reportArgumentType]
    assert isinstance(child, Node)
    return str(child._value())


def kind_of_items(node: DictConfig | ListConfig) -> type | None:
    """Return the type that the items of a list or mapping must have; None if any may be."""
    kind = node._metadata.element_type
    return kind if isinstance(kind, type) and kind is not Any else None


def error_key(error: OmegaConfBaseException) -> str:
    """Return the key of an error, with dots between its parts; empty if it has none."""
    return str(error.full_key or error.key or "")


def error_schema(error: OmegaConfBaseException) -> type | None:
    """Return the class of the node that holds the key: the dataclass that is its schema."""
    return error.object_type if isinstance(error.object_type, type) else None


_update = OmegaConf.update


def accept_overrides_of_null() -> None:
    """Let overrides give a mapping to a key that is null, or set a key within it."""
    OmegaConf.update = staticmethod(_update_null)  # pyright: ignore[reportAttributeAccessIssue]


def _update_null(
    cfg: DictConfig, key: str, value: Any = None, *, merge: bool = True, force_add: bool = False
) -> None:
    parts, node = split_key(key), cfg
    for depth, part in enumerate(parts, 1):
        node = node._get_node(part, validate_access=False)
        if not isinstance(node, DictConfig) or node._is_missing():
            break
        if node._is_none() and (depth < len(parts) or isinstance(value, Mapping)):
            for each in reversed(parts):
                value = {each: value}
            with open_dict(cfg) if force_add or depth == len(parts) else nullcontext():
                cfg.merge_with(value)
            return
    _update(cfg, key, value, merge=merge, force_add=force_add)
