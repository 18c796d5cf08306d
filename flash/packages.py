"""Packages of the installations `[train]` and `[all]`, and the error for a missing one."""

from collections.abc import Iterable
from importlib.util import find_spec

from flash import commands

TRAIN = frozenset({
    "datasets",
    "huggingface_hub",
    "jaxtyping",
    "jinja2",
    "lightning",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "torchao",
    "tqdm",
    "transformers",
    "wandb",
})
"""Packages that `pip install 'mobilellm-flash[train]'` adds, by the name of their import."""
FULL = frozenset({
    "botorch",
    "executorch",
    "gguf",
    "gpytorch",
    "linear_operator",
    "lm_eval",
    "optuna",
    "plotly",
    "psutil",
    "scipy",
    "sqlalchemy",
    "torchmetrics",
    "wandb_workspaces",
})
"""Packages that `pip install 'mobilellm-flash[all]'` adds to `TRAIN`."""


def require_packages(names: Iterable[str]) -> None:
    """Check that packages are installed, without importing them.

    Raises:
        ModuleNotFoundError: One is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Explain in one line that a package is not installed; None if it is none of flash's packages.

    A module that is missing within an installed package is no such error.
    """
    if error.name not in TRAIN | FULL:
        return None
    verb = commands.this_verb()
    if verb in {"train", "prepare"}:
        installation = "installation for training: pip install 'mobilellm-flash[train]'"
    else:
        installation = "full installation: pip install 'mobilellm-flash[all]'"
    needs = f"{commands.command(verb)}: needs {error.name}, which is not installed"
    return f"{needs}; expected the {installation}"
