"""Private names of dependencies are used only in modules that have a contract test."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ("flash/compat", "flash/lowering/patches", "flash/device/runner.py")
"""Paths whose files may use private names."""
DOCUMENTED = {"_asdict", "_exit", "_fields", "_make", "_replace"}
"""Documented names of the standard library that begin with an underscore."""
COMPAT = {
    "hydra": {"hydra", "omegaconf"},
    "executorch_llm": {"executorch", "torch"},
    "submitit": {"hydra", "hydra_plugins", "omegaconf", "submitit"},
    "torchao": {"torch", "torchao"},
    "wandb_workspaces": {"wandb", "wandb_workspaces"},
}
"""Packages that a module of flash.compat may import; by default the one it is named after."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED | {"_"}


def sources() -> dict[str, ast.Module]:
    """Return the syntax trees of all files except tests, by path from the root."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("flash/**/*.py")]
    trees = {path: ast.parse(path.read_text("utf-8")) for path in paths}
    return {path.relative_to(ROOT).as_posix(): tree for path, tree in trees.items()}


def defined_names(tree: ast.AST) -> set[str]:
    """Return the names of classes, functions, variables, parameters and fields of a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return names


def foreign_modules(tree: ast.AST) -> set[str]:
    """Return the names that imports bind to modules, classes or functions of dependencies."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not is_ours(node.module):
            names |= {a.asname or a.name for a in node.names}
    return names


def is_ours(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in {"benchmarks", "flash"}


def root_of(node: ast.expr) -> str | None:
    """Return the name at the start of a chain of attributes; None for another expression."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def imported_privately(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Import):
        parts = [part for alias in node.names for part in alias.name.split(".")]
    elif is_ours(node.module):
        return False
    else:
        parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
    return any(map(is_private, parts))


def private_uses(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Iterate over line and text of each use of a private name that the project does not define.

    Every private name of an imported module, class or function of a dependency is reported, and any
    other that is not in `ours`, the names that the project defines. An attribute of `self` may be
    an object of a dependency, so its private names must be defined in the file itself.
    """
    own, foreign = defined_names(tree), foreign_modules(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                found = imported_privately(node)
            case ast.Attribute(attr=name, value=value):
                root = root_of(value)
                known = own if root == "self" and isinstance(value, ast.Attribute) else ours
                found = is_private(name) and (root in foreign or name not in known)
            case ast.keyword(arg=str(name)):
                found = is_private(name) and name not in ours
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                found = is_private(name) and name not in own
            case _:
                continue
        if found:
            line = node.value.lineno if isinstance(node, ast.keyword) else node.lineno
            yield line, ast.unparse(node)


def test_private_names_of_dependencies_are_used_only_where_allowed():
    trees = sources()
    ours = set().union(*map(defined_names, trees.values()))
    found = [
        f"{path}:{line}: {text}"
        for path, tree in trees.items()
        if not path.startswith(ALLOWED)
        for line, text in private_uses(tree, ours)
    ]
    assert not found, "move these into flash/compat, with a contract test: " + "; ".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import hydra._internal.utils",
        "from torch._subclasses import FakeTensor",
        "from torch.fx.graph import _PyTreeCodeGen",
        "import torch\ntorch._check(True)",
        "from optuna.samplers import NSGAIISampler as N\nN._get_generation_key()",
        "import optuna\noptuna.load_study()._storage",
        "def f(node):\n    return node._get_node('x')",
        "class A(B):\n    def f(self):\n        return self._device_mesh",
        "class A(B):\n    def f(self):\n        return self.trainer._results",
        "EdgeCompileConfig(_check_ir_validity=False)",
        "getattr(x, '_op', x)",
    ],
)
def test_private_uses_are_found(code):
    assert list(private_uses(ast.parse(code), {"_check", "_mine"}))


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self, o):\n        o._x",
        "class A(B):\n    def f(self):\n        return self._mine()",
        "from flash.search import study\nstudy._mine()",
        "batch._replace(x=1)._asdict()",
        "import os\nos._exit(1)",
        "x.__class__.__name__",
        "for _ in range(3):\n    pass",
    ],
)
def test_private_names_of_the_project_are_not_reported(code):
    assert not list(private_uses(ast.parse(code), {"_mine", "_x"}))


@pytest.mark.parametrize("path", sorted((ROOT / "flash/compat").glob("*.py")), ids=lambda p: p.stem)
def test_a_module_of_compat_imports_only_its_dependency(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module))
    roots = {name.partition(".")[0] for name in imported if name != "flash.errors"}
    assert roots <= COMPAT.get(path.stem, {path.stem}) | sys.stdlib_module_names


def test_each_module_of_compat_has_a_contract_test():
    modules = {path.stem for path in (ROOT / "flash/compat").glob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert modules <= tests
