"""Fixtures shared by the tests: the real SmolLM2 model, small models saved to disk, the native kernels."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

import pytest

from qlora_kernels.cpu.build import build

build()  # before anything loads the library: an edited source is never tested through what it was compiled to before

# A cache of the tests' own: theirs of small files would push out the user's, and what his holds would decide for them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import emulated
import torch
import transformers
from helpers import ISAS
from tiny import random_model

import qlora
from qlora_kernels.cpu import native

transformers.utils.logging.disable_progress_bar()
# A shell starts what runs behind it with SIGINT ignored, nohup with SIGHUP, for its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


@pytest.fixture(scope="session")
def loaded_kernels(tmp_path_factory):
    if emulated.CHOSEN:
        library = emulated.Library(tmp_path_factory.mktemp("emulated"))
        yield native.Native(library)
        library.close()
        return
    loaded, words = native.load()
    assert loaded is not None, words
    yield loaded


@pytest.fixture
def kernels(loaded_kernels):
    """The native kernels themselves, whatever the operators were bound to when they were imported. Which instruction
    set they use is the library's state,
    not theirs: the best again after each test, since the operators of the next one count on it.
    """
    yield loaded_kernels
    loaded_kernels.select()


@pytest.fixture(params=["", *ISAS], ids=["best", *ISAS])
def isa(request, kernels):
    """The kernels by the best that the processor has, which may be its matrix unit, and by each instruction set."""
    kernels.select(request.param)
    return kernels


@pytest.fixture
def poisoned():
    """Every `torch.empty` comes filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """One thread unless a test says more: most of the work here is too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
