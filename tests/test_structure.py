"""Imports: packages follow one order without cycles, and light modules import nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import flash

ROOT = Path(flash.__file__).parent

# A package imports only from packages earlier in this list. Modules that are directly in flash
# count as packages.
ORDER = [
    "errors",
    "ranks",
    "bundled",
    "commands",
    "provenance",
    "crash",
    "signals",
    "terminal",
    "packages",
    "renamed",
    "compat",
    "log_filters",
    "progress",
    "paths",
    "records",
    "sealed",
    "outcome",
    "slurm",
    "sweep",
    "arch",
    "model",
    "data",  # streams text of a backbone's tokenizer
    "prune",
    "rounding",
    "lowering",
    "interop",
    "device",
    "workspace",
    "tracking",
    "training",
    "latency",
    "evaluation",  # a search may ask tasks
    "search",
    "export",
    "report",
    "dashboards",
    "schemas",
    "config_errors",
    "naming",
    "option_files",
    "config",
    "config_reference",
    "help",
    "completion",
    "jobs",
    "cli",
    "__main__",
]
LIGHT = ["errors", "paths", "ranks", "records", "arch", "config", "cli", "completion"]
HEAVY = ["torch", "lightning", "executorch", "botorch", "transformers", "lm_eval", "wandb"]


def modules() -> dict[str, Path]:
    """Return the path of every module of the project by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, also if only for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module or "")
    return {name for name in found if name.startswith("flash.")} & set(modules())


def room(module: str) -> str:
    """Return the package of a module; for a module that is directly in flash, its own name."""
    return module.split(".")[1]


def test_every_package_has_its_place_in_the_order():
    rooms = {room(name) for name in modules() if name != "flash"}
    assert rooms == set(ORDER)


def test_no_package_imports_from_a_later_one():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name != "flash"
        for other in imports(path)
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert upward == []


def test_imports_have_no_cycles():
    graph = {name: imports(path) - {name} for name, path in modules().items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert graph == {}


def test_settings_errors_and_records_load_nothing_heavy():
    names = [f"flash.{name}" for name in LIGHT]
    names += [name for name in modules() if name.endswith(".settings")]
    check = f"import sys, {', '.join(names)}; print(sorted(sys.modules.keys() & {set(HEAVY)}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_completion_needs_no_hydra():
    check = "import sys, flash.cli, flash.completion; print('hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
