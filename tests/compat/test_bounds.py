"""Dependencies in pyproject.toml: upper bounds, and agreement with constraints.txt and imports."""

import ast
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from flash import packages

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
REQUIRED = [
    each for each in [*BASE, *EXTRAS["train"], *EXTRAS["all"]] if each.name != PROJECT["name"]
]
OPTIONAL = [each for extra in ("docs", "postgres", "slurm", "llama-cpp") for each in EXTRAS[extra]]
TORCH_FOR_TRAINING = next(each for each in EXTRAS["train"] if each.name == "torch")
KNOWN_FROM_INSIDE = {
    "executorch",
    "hydra-core",
    "hydra-submitit-launcher",
    "lightning",
    "omegaconf",
    "optuna",
    "submitit",
    "torch",
    "torchao",
    "wandb",
    "wandb-workspaces",
}
"""Dependencies whose minor versions may break flash.compat."""


def constraints() -> dict[str, Version]:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").split():
        name, _, number = line.partition("==")
        pinned[canonicalize_name(name)] = Version(number)
    return pinned


@pytest.mark.parametrize("requirement", [*REQUIRED, *OPTIONAL], ids=lambda each: each.name)
def test_a_dependency_has_an_upper_bound_that_admits_the_tried_version(requirement):
    upper = {spec.operator for spec in requirement.specifier} & {"<", "=="}
    assert upper, f"{requirement}: give it an upper bound"
    tried = constraints().get(canonicalize_name(requirement.name))
    if tried is None:  # built by the user, so it is not pinned
        return
    assert tried in requirement.specifier
    if requirement.name in KNOWN_FROM_INSIDE and requirement is not TORCH_FOR_TRAINING:
        next_minor = f"{tried.major}.{tried.minor + 1}"
        assert next_minor not in requirement.specifier, f"{requirement}: expected <{next_minor}"


def test_tests_run_with_the_versions_that_are_declared():
    wrong = [
        f"{requirement}, installed {version(requirement.name)}"
        for requirement in REQUIRED
        if version(requirement.name) not in requirement.specifier
    ]
    assert not wrong


def test_training_admits_the_versions_of_torch_that_it_was_tried_with():
    assert all(each in TORCH_FOR_TRAINING.specifier for each in ("2.11.0", "2.15.0"))
    assert not any(each in TORCH_FOR_TRAINING.specifier for each in ("2.10.9", "2.16.0"))


def modules(requirements: Iterable[Requirement]) -> set[str]:
    """Return the modules of these requirements, by the names of their imports."""
    others = {
        "hydra-core": "hydra",
        "llama-cpp-python": "llama_cpp",
        "lm-eval": "lm_eval",
        "pyyaml": "yaml",
        "wandb-workspaces": "wandb_workspaces",
    }
    return {others.get(each.name, each.name) for each in requirements} - {PROJECT["name"]}


def imported() -> set[str]:
    """Return the modules that flash imports, except its own and those of Python."""
    found = set()
    for path in (ROOT / "flash").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"flash", "runner"}  # runner.py is alone on boards


def test_every_import_is_a_dependency_and_every_dependency_is_imported():
    optional = modules([*EXTRAS["slurm"], *EXTRAS["llama-cpp"]])
    optional |= {"hydra_plugins", "optuna_dashboard"}
    assert modules(REQUIRED) == imported() - optional


def test_missing_packages_are_those_of_the_extras():
    assert modules(EXTRAS["train"]) == packages.TRAIN
    assert modules(EXTRAS["all"]) - {"torch"} == packages.FULL
