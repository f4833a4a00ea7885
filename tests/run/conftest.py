"""A tiny model with data, and options of short runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from runs import SHORT

from qlora.config.commands import FinetuneConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model/`, `data.jsonl` and `held.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data.jsonl")
    tiny.write_data(folder / "held.jsonl", count=8, seed=7)
    return folder


@pytest.fixture
def config(place, tmp_path):
    """Options of a short run; changes are given by name."""

    def make(output: str = "run", **changes) -> FinetuneConfig:
        usual = SHORT | {
            "model": str(place / "model"),
            "data": str(place / "data.jsonl"),
            "output": str(tmp_path / output),
        }
        if "epochs" in changes:
            del usual["steps"]
        return FinetuneConfig(**(usual | changes))

    return make
