"""Fixtures shared by the tests: the real SmolLM2 model, and small models saved to disk."""

from __future__ import annotations

import pytest
from qlora_kernels.cpu.build import build

build()  # before anything loads the library: an edited source is never tested through what it was compiled to before

import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import random_model  # noqa: E402

import qlora  # noqa: E402

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's own tokenizer with its chat template (pad is eos there)."""
    return qlora.load_tokenizer("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_dense():
    """SmolLM2-135M-Instruct in float32, not to be changed."""
    return qlora.load_base("smollm2-135m", bits=16, dtype="fp32")


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory, tokenizer):
    """`saved_models(name)` is the folder of a tiny random model of that architecture, with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("models")

    def saved(name: str):
        if not (folder / name).exists():
            random_model(name).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return saved


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
