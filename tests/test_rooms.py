"""Imports within the package run one way, and importing it loads no more than it needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_hadacore

PACKAGE = Path(__file__).parents[1] / "hf_hadacore"
# Each knows those before it, and none behind it.
ROOMS = (
    "_version",
    "errors",
    "int4",
    "hadamard_matrices",
    "config",
    "compat",
    "integrity",
    "architecture",
    "name_patterns",
    "text_windows",
    "probing",
    "kernels",
    "solvers",
    "modules",
    "attention",
    "fusion",
    "decoding",
    "parallel",
    "layer_plan",
    "quantizer",
    "offline",
    "inspection",
    "pretrained",
    "interchange",
    "evaluation",
    "publishing",
    "commands",
    "cli",
    "__main__",
)


def imports(node: ast.AST, room: tuple[str, ...]) -> Iterator[str]:
    """Full names of what a module imports, within functions too; what type checkers alone see is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = room[: len(room) - child.level + 1] if child.level else ()
            base = ".".join((*above, *filter(None, [child.module])))
            names = [f"{base}.{alias.name}" for alias in child.names]
            yield from (name if name in FILES else base for name in names)
        yield from imports(child, room)


def full_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(name: str) -> str:
    return name.split(".")[1]


FILES = {full_name(file): file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
IMPORTS = {
    name: [*imports(ast.parse(file.read_text("utf-8")), tuple(name.split(".")[:-1]))]
    for name, file in FILES.items()
}


def test_rooms_are_known():
    assert {room_of(name) for name in FILES} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_one_way(name):
    later = ROOMS[ROOMS.index(room_of(name)) + 1 :]
    assert not [other for other in IMPORTS[name] if other in FILES and room_of(other) in later]


def test_modules_form_no_circle():
    graph = {name: [other for other in IMPORTS[name] if other in FILES] for name in FILES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name) in ("int4", "kernels", "solvers")])
def test_tensors_know_nothing_of_transformers(name):
    assert not [other for other in IMPORTS[name] if other.partition(".")[0] == "transformers"]


def test_importing_loads_no_more_than_loading_a_model_needs():
    program = (
        "import sys, hf_hadacore\n"
        "own = [module for name, module in sys.modules.items() if name.startswith('hf_hadacore.')]\n"
        "print(*(module.__name__ for module in own if {'triton', 'gluon'} & vars(module).keys()))\n"
        "print(*({'datasets', 'matplotlib', 'lm_eval', 'typer', 'hf_hadacore.offline'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_public_names_are_there():
    for name in hf_hadacore.__all__:
        assert getattr(hf_hadacore, name) is not None and name in dir(hf_hadacore)
    with pytest.raises(AttributeError, match="no attribute 'quantise_checkpoint'"):
        hf_hadacore.quantise_checkpoint  # noqa: B018
