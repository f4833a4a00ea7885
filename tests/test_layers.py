"""The house's order, read from the import statements: a file imports only from layers below its own.

Imports inside functions count too. `qlora/__init__.py` stands before the door: it only names where things live.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora

HOUSE = Path(__file__).resolve().parents[1]

LAYERS = (
    ("errors",),
    ("config",),
    ("nf4", "attention", "fused", "files"),
    ("linear", "loss", "paging"),
    ("adapters", "optim"),
    ("records", "chat", "sources"),
    ("model", "data"),
    ("adapter_files",),
    ("checkpoint",),
    ("train", "generate", "evaluate", "merging"),
    ("plan",),
    ("recipe",),
    ("doctor",),
    ("cli",),
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(path.stem for path in (HOUSE / "qlora").glob("*.py") if path.stem != "__init__")
KERNELS = sorted((HOUSE / "kernels").rglob("*.py"))


def imported(path: Path, package: str) -> Iterator[str]:
    """The dotted names that a file imports, with `from a import b` as a.b and relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            yield from (f"{home}.{name.name}" for name in node.names)


def test_every_module_has_a_layer():
    assert set(MODULES) - set(LEVEL) == set()
    assert not [path for path in (HOUSE / "qlora").iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    names = [name.split(".") for name in imported(HOUSE / "qlora" / f"{module}.py", "qlora")]
    used = {parts[1] for parts in names if parts[0] == "qlora" and parts[1:] and parts[1] in MODULES}
    assert {name for name in used if LEVEL[name] >= LEVEL[module]} == set()
    # the front door may be asked for the version, and for nothing else
    front = {parts[1] if parts[1:] else "qlora" for parts in names if parts[0] == "qlora"} - set(MODULES)
    assert front <= {"__version__"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_know_nothing_of_qlora(path):
    assert not [name for name in imported(path, "qlora_kernels") if name.split(".")[0] == "qlora"]


def test_kernels_folder_is_no_package():
    """A regular package named kernels would stand in for Hugging Face's library, which transformers looks for."""
    assert KERNELS and not (HOUSE / "kernels" / "__init__.py").exists()


def test_no_module_takes_the_place_of_an_exported_function():
    assert not set(qlora.__all__) & set(MODULES)
