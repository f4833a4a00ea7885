"""Scripts name only what there is. Most of their imports stand inside functions, and no test runs every benchmark."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((HOUSE / "scripts").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_imports_from_us_exists(script):
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("qlora", "qlora_kernels"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    try:
                        importlib.import_module(f"{node.module}.{name.name}")
                    except ModuleNotFoundError:
                        missing.append(f"{node.module}.{name.name}")
    assert SCRIPTS and missing == []
