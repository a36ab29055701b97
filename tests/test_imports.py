"""The structure of the package, read off its imports: no circle, none that runs upwards, a core that needs torch alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "tmpo_trainer"
#: From the bottom up. A module may import those of its own row's package and of the rows below, also inside functions.
ROWS = (
    ("__init__",),
    ("settings",),
    ("files", "hub", "processes"),
    ("flow", "objectives", "diversity"),
    ("tree", "selection"),
    ("demo", "pictures"),
    ("prompts", "nuisance"),
    ("rewards", "backbones"),
    ("methods",),
    ("lora",),
    ("evaluation",),
    ("training",),
    ("toy",),
    ("commands",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
#: Modules of pure functions on tensors.
CORE = ("flow", "tree", "objectives", "diversity", "selection")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path, inner: bool) -> set[str]:
    """The modules that a file imports, by absolute names; with `inner` also inside functions and for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import tree` is of a module, `from .tree import tile` of a name.
            found |= {f"{start}.{alias.name}" if f"{start}.{alias.name}" in MODULES else start for alias in node.names}
    return found


def row_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_upwards(name: str) -> None:
    own = row_of(name)
    for other in imports(MODULES[name], inner=True) & MODULES.keys():
        # The folders of a row know nothing of each other.
        fine = row_of(other) == own or RANK[row_of(other)] < RANK[own]
        assert fine, f"{name} imports {other}: {own} is not above {row_of(other)}"


def test_no_circle() -> None:
    graph = {name: imports(file, inner=True) & MODULES.keys() - {name} for name, file in MODULES.items()}
    # A package is not above its own files.
    graph = {name: {o for o in others if not name.startswith(f"{o}.")} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_torch_alone(name: str) -> None:
    foreign = {
        module.split(".")[0]
        for module in imports(PACKAGE / f"{name}.py", inner=True)
        if module.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= {"torch", "tmpo_trainer"}


@pytest.mark.parametrize("package", ["settings", "methods"])
def test_settings_and_methods_load_without_torch(package: str) -> None:
    """`--help` reads the settings of every method. `methods/batch.py` is loaded by what trains."""
    for file in sorted((PACKAGE / package).rglob("*.py")):
        if file.name != "batch.py":
            assert not {"torch", "diffusers", "transformers"} & {m.split(".")[0] for m in imports(file, inner=False)}


def test_nodes_import_the_package_relatively() -> None:
    """ComfyUI has a top-level module `nodes` of its own, and imports this folder under any name."""
    for file in sorted((REPOSITORY / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not any(name.split(".")[0] in ("tmpo_trainer", "nodes") for name in names), file.name
