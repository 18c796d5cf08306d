"""Files that come with the package: the configuration groups and the tiny backbone.

A clone has them at the top of the repository, a wheel inside of the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent

CONF = _ROOT / "conf"
"""Folder of the configuration groups."""


def bundled(name: str) -> str:
    """Absolute path of a file or folder that comes with the package; `${bundled:NAME}` in YAML."""
    return str(_ROOT / name)
