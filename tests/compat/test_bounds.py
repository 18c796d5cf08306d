"""Versions of dependencies in pyproject.toml: upper bounds, and agreement with constraints.txt."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = [
    Requirement(line)
    for extra, lines in PROJECT["optional-dependencies"].items()
    for line in lines
    if extra != "dev"
]
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
    if requirement.name in KNOWN_FROM_INSIDE:
        next_minor = f"{tried.major}.{tried.minor + 1}"
        assert next_minor not in requirement.specifier, f"{requirement}: expected <{next_minor}"


def test_tests_run_with_the_versions_that_are_declared():
    wrong = [
        f"{requirement}, installed {version(requirement.name)}"
        for requirement in REQUIRED
        if version(requirement.name) not in requirement.specifier
    ]
    assert not wrong
