"""What the training loop and the optimizer load when they are imported: torch, and nothing that they do not know."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "import sys, {}; print(*sorted(sys.modules))"


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        ("qlora.train.loop", ("transformers", "qlora.models", "qlora.export", "qlora.config", "yaml")),
        ("qlora.train.step", ("transformers", "qlora.models", "qlora.export", "qlora.config", "yaml")),
        ("qlora.optim.adamw", ("transformers", "qlora.models", "qlora.export", "qlora.config", "qlora.train", "yaml")),
    ],
)
def test_nothing_from_above_is_loaded(module, unknown):
    done = subprocess.run([sys.executable, "-c", LOADED.format(module)], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded
    assert [name for name in loaded if any(name == u or name.startswith(f"{u}.") for u in unknown)] == []
