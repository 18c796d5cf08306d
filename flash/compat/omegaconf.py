"""OmegaConf: nodes that are not resolved when they are looked at, and the keys of errors.

Names that OmegaConf 2.3 does not document, and the reasons to use them:

- `DictConfig._get_node`, `Node._is_none` and `Node._is_missing`: the public access raises for a
  missing value and resolves an interpolation; the check for unknown keys must do neither.
- `OmegaConfBaseException.full_key`, `.key` and `.object_type`: where in the configuration an error
  is, so that a message can name the key.
- The words "Unexpected type for root" of an AssertionError of `OmegaConf.update`: the only sign of
  an override that sets a key within a null.
"""

from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException


def child_mapping(node: DictConfig, key: str) -> DictConfig | None:
    """The mapping below `key`; None where the value is null, missing or no mapping."""
    child = node._get_node(key)
    if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
        return None
    return child


def child_containers(
    node: DictConfig | ListConfig,
) -> Iterator[tuple[str | int, DictConfig | ListConfig]]:
    """Keys (indices, in a list) and mappings or lists directly below; null and missing left out."""
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child = node._get_node(key)
        known = isinstance(child, DictConfig | ListConfig)
        if known and not child._is_none() and not child._is_missing():
            yield key if isinstance(key, int) else str(key), child


def error_key(error: OmegaConfBaseException) -> str:
    """The key that an error is about, with dots between its parts; "" where it names none."""
    return str(error.full_key or error.key or "")


def error_schema(error: OmegaConfBaseException) -> type | None:
    """The class of the node that holds the key, a dataclass where the node has a schema."""
    return error.object_type if isinstance(error.object_type, type) else None


def sets_key_within_null(error: AssertionError) -> bool:
    """Whether OmegaConf raised this since an override sets a key within a value that is null."""
    return str(error).startswith("Unexpected type for root")
