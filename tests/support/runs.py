"""What the tests of whole runs share: a short run's options, its metrics, its checkpoints compared, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora.config.commands import FinetuneConfig
from qlora.errors import UserError
from qlora.run.recipe import finetune
from qlora.train.checkpoint import read_state

# What most runs are about is not how adapters begin: test_start.py and test_codes.py are.
SHORT = {"steps": 4, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "adapter_init": "zero"}
SHORT |= {"device": "cpu", "dtype": "fp32"}


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_files(one: Path, two: Path) -> None:
    """Every adapter and optimizer tensor of two checkpoints, and the random states, bit by bit."""
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys() and len(first) > 10
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert read_state(one)["random"] == read_state(two)["random"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(config: FinetuneConfig) -> list[str]:
    with pytest.raises(UserError) as error:
        finetune(config)
    return error.value.problems
