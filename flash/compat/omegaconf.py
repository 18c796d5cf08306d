"""OmegaConf: access to nodes without resolving them, and the keys of errors.

Names that OmegaConf 2.3 does not document, and the reasons to use them:

- `DictConfig._get_node`, `Node._is_none` and `Node._is_missing`: public access raises for missing
  values and resolves interpolations; the check for unknown keys must do neither.
- `OmegaConfBaseException.full_key`, `.key` and `.object_type`: locate an error in the
  configuration, so that a message can name the key.
- The text "Unexpected type for root" of an AssertionError of `OmegaConf.update`: the only way to
  recognize an override that sets a key within a null.
"""

from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException


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


def error_key(error: OmegaConfBaseException) -> str:
    """Return the key of an error, with dots between its parts; empty if it has none."""
    return str(error.full_key or error.key or "")


def error_schema(error: OmegaConfBaseException) -> type | None:
    """Return the class of the node that holds the key: the dataclass that is its schema."""
    return error.object_type if isinstance(error.object_type, type) else None


def sets_key_within_null(error: AssertionError) -> bool:
    """Return True if OmegaConf raised `error` for an override of a key within a null value."""
    return str(error).startswith("Unexpected type for root")
