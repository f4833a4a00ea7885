"""The house's order, read from the import statements: a file imports only from floors below its own.

Imports inside functions count too. `qlora/__init__.py` stands before the door: it only names where things live. The
files of one floor may not import each other, so a floor is what can be read in any order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora

HOUSE = Path(__file__).resolve().parents[1]

FLOORS = (
    (
        "calibrate.error_start",
        "data.batch",
        "data.doctor_page",
        "data.typed",
        "errors",
        "layers.attention_kernels",
        "layers.dropout",
        "layers.norms",
        "layers.transformers_code",
        "models.gguf_layout",
        "models.transformers_seam",
        "posix",
        "selftest.names",
        "selftest.operators",
        "sizes",
        "streams",
        "threads",
    ),
    (
        "calibrate.gptq",
        "data.order",
        "data.records",
        "data.template",
        "export.gguf_config",
        "files",
        "layers.attention",
        "models.gguf_header",
        "models.hub",
        "models.saver",
        "optim.memory_errors",
        "paths",
        "selftest.speed",
        "specs",
        "train.memory",
        "train.rng",
        "train.signals",
    ),
    (
        "calibrate.moments",
        "config.options",
        "data.chat",
        "data.formats",
        "layers.nf4",
        "manifest",
        "models.device",
        "models.gguf",
        "models.gguf_config",
        "models.gguf_splits",
        "models.info",
        "optim.disk_tier",
        "selftest.first_use",
        "train.metrics",
    ),
    (
        "config.shared",
        "data.prompts",
        "data.tokenize",
        "doctor",
        "export.card",
        "export.gguf_tokens",
        "layers.weight",
        "models.gguf_cache",
        "optim.pinned_tier",
        "run.watch",
    ),
    ("config.commands", "data.doctor", "layers.forward", "layers.linear", "models.source", "optim.pager"),
    ("config.data_command", "layers.adapters", "layers.targets", "models.limits", "models.packed", "optim.pages"),
    (
        "generate",
        "layers.attach",
        "layers.forward_mode",
        "layers.functions",
        "layers.joined",
        "models.quantize",
        "optim.moments",
    ),
    ("layers.decoder",),
    (
        "export.peft",
        "layers.fused",
        "layers.loss",
        "layers.mixed",
        "models.originals",
        "optim.flat",
        "optim.state_dict",
        "run.inputs",
        "run.untouched",
    ),
    (
        "calibrate.codes",
        "calibrate.gap",
        "calibrate.start",
        "evaluate",
        "layers.combine",
        "models.load",
        "optim.update",
        "run.data_command",
        "train.step",
        "train.trial",
    ),
    (
        "export.gguf_file",
        "export.peft_write",
        "export.shards",
        "optim.adamw",
        "plan.tracker",
        "run.adapted",
        "run.assemble",
        "run.start",
        "train.loop",
    ),
    (
        "chat",
        "export.adapted_source",
        "export.pretrained",
        "plan.meta",
        "run.optimizer",
        "run.trace",
        "train.checkpoint",
    ),
    ("export.kept", "plan.fit", "run.identity", "run.output", "run.report", "run.verify"),
    ("export.bnb", "export.gguf", "export.merge", "export.verify", "plan.report"),
    ("export.fold", "run.codes", "run.commands", "run.run"),
    ("export.formats", "run.recipe"),
    ("selftest.training",),
    ("selftest.child",),
    ("selftest.report",),
    ("command_table",),
    ("cli",),
    ("__main__",),
)
FLOOR = {module: level for level, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(
    ".".join(path.relative_to(HOUSE / "qlora").with_suffix("").parts)
    for path in (HOUSE / "qlora").rglob("*.py")
    if path.stem != "__init__"
)
KERNELS = sorted((HOUSE / "kernels").rglob("*.py"))


def imported(path: Path, package: str) -> Iterator[str]:
    """The dotted names that a file imports, with `from a import b` as a.b and relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            yield from (f"{home}.{name.name}" for name in node.names)


def module_of(name: str) -> str | None:
    """The module of `qlora` that a dotted name leads into, without the package: "qlora.layers.nf4.rows" ->
    "layers.nf4".
    """
    parts = name.split(".")
    if parts[0] != "qlora":
        return None
    return next((".".join(parts[1:end]) for end in range(len(parts), 1, -1) if ".".join(parts[1:end]) in FLOOR), "")


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    names = list(imported(HOUSE / "qlora" / f"{module.replace('.', '/')}.py", "qlora"))
    used = {module_of(name) for name in names} - {None, ""}
    assert {name for name in used if FLOOR[name] >= FLOOR[module]} == set()
    # the front door may be asked for the version, and for nothing else
    assert {name for name in names if module_of(name) == ""} <= {"qlora.__version__"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_know_nothing_of_qlora(path):
    assert not [name for name in imported(path, "qlora_kernels") if name.split(".")[0] == "qlora"]


def test_kernels_folder_is_no_package():
    """A regular package named kernels would stand in for Hugging Face's library, which transformers looks for."""
    assert KERNELS and not (HOUSE / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", [HOUSE / "qlora", *(path for path in (HOUSE / "qlora").iterdir() if path.is_dir())])
def test_packages_are_only_folders(folder):
    """Names live in modules: what a package's `__init__` imports is paid for by everybody who imports a neighbour."""
    if folder.name not in ("qlora", "__pycache__"):
        assert (folder / "__init__.py").read_text() == ""


def test_no_module_takes_the_place_of_an_exported_function():
    taken = {module.split(".")[0] for module in MODULES}
    assert not set(qlora.__all__) & taken
