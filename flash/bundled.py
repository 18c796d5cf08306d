"""Paths of bundled files: the configuration groups and the tiny backbone.

They are at the top of the repository; in a wheel they are inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent

CONF = _ROOT / "conf"
"""Folder of the configuration groups."""


def bundled(name: str) -> str:
    """Return the absolute path of a bundled file or folder; `${bundled:NAME}` in YAML."""
    return str(_ROOT / name)
