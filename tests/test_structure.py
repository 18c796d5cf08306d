"""Facts about imports: one order of packages, no circle, and light modules that stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import flash

ROOT = Path(flash.__file__).parent

# From the ground up: a package imports only from those before it. Modules beside the packages
# count as packages. `__main__` modules are commands: they stand above all, and nothing imports
# them.
ORDER = [
    "errors",
    "ranks",
    "log_filters",
    "progress",
    "bundled",
    "renamed",
    "commands",
    "compat",
    "paths",
    "records",
    "slurm",
    "arch",
    "model",
    "data",  # streams text of a backbone's tokenizer
    "prune",
    "lowering",
    "interop",
    "device",
    "workspace",
    "training",
    "latency",
    "search",
    "export",
    "evaluation",
    "report",
    "config",
    "config_reference",
    "cli",
]
LIGHT = ["errors", "paths", "ranks", "records", "arch"]
HEAVY = ["torch", "lightning", "executorch", "botorch", "transformers", "lm_eval", "wandb"]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, those for type checkers included."""
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
    """Package of a module, or its own name where it stands beside the packages."""
    return module.split(".")[1]


def test_every_package_has_its_place_in_the_order():
    rooms = {room(name) for name in modules() if name not in {"flash", "flash.__main__"}}
    assert rooms <= set(ORDER)


def test_no_arrow_points_upward():
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name != "flash" and not name.endswith(".__main__")
        for other in imports(path)
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert upward == []


def test_modules_do_not_import_each_other_in_circles():
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
