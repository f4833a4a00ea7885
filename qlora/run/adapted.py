"""A model ready to generate or to be evaluated: adapters on the base they were trained on, or a bare base.

    qlora.json -> base (name, bits, block size, dtype) -> load_source -> put_adapter -> tokenizer of the adapter

Several adapters share one base, each with the tokenizer that was saved with it. The alternative, to ask for the options
of the training again, would load other weights where one is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.errors import UserError, problem
from qlora.export.peft import AdapterFiles, adapter_tokenizer, base_problems, put_adapter, read_adapter
from qlora.layers.attach import activate, adapters_of, disabled
from qlora.models.info import BaseInfo
from qlora.models.load import load_source
from qlora.models.source import load_tokenizer, resolve
from qlora.specs import Quantization

BASE = "base"  # what the model without an adapter is called


@dataclass(frozen=True)
class Voice:
    """Who answers: an adapter of a model by its name there, with its folder and its tokenizer; without a folder the
    base itself.
    """

    name: str
    folder: str | None
    tokenizer: PreTrainedTokenizerBase


def load_adapted(
    adapter: str | Path | None,
    *,
    model: str | None = None,
    bits: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer): an adapter on its base, or a bare base if `adapter` is None.

    `model` says where the base lies now; `bits` (None: 4) holds where the adapter has nothing to say.

    Raises:
        UserError: see `load_voices`.
    """
    adapters = [] if adapter is None else [adapter]
    loaded, voices = load_voices(
        adapters, model=model, bits=bits, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    return loaded, voices[0].tokenizer


def load_voices(
    adapters: Sequence[str | Path],
    *,
    model: str | None = None,
    bits: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, list[Voice]]:
    """(model in evaluation mode, who answers): the adapters, the first of them active, and behind them the base.

    Raises:
        UserError: see `load_base` and `load_adapter`; an adapter that names no base, was trained on other `bits`, on
            another base than the first one, or is given twice.
    """
    files = [read_adapter(adapter) for adapter in adapters]
    trained = files[0].base if files else BaseInfo()
    problems = [
        problem("bits", bits, f"the adapter was trained on {one.base.bits} bits", _OTHER_BITS)
        for one in files
        if one.base.bits is not None and bits not in (None, one.base.bits)
    ]
    problems += [line for one in files[1:] for line in base_problems(trained, one.base, one.folder)]
    folders = [one.folder.resolve() for one in files]
    problems += [
        problem("adapter", one, "is given twice", "Give each adapter once")
        for one in dict.fromkeys(folders)
        if folders.count(one) > 1
    ]
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    name, revision = (trained.model, trained.revision) if model is None else (model, None)
    if name is None:
        raise UserError(problem("adapter", adapters[0], "does not name its base model", "Give `model` too"))
    source = resolve(name, revision, trust_remote_code=trust_remote_code)
    quantization = Quantization(bits or 4)
    if trained.bits is not None:
        quantization = trained.quantization(source.packed)
        dtype = trained.dtype if dtype == "auto" and trained.dtype else dtype
    own = [adapter_tokenizer(one.folder, trust_remote_code=trust_remote_code) for one in files]
    fallback = load_tokenizer(source) if None in own or not own else own[0]
    assert fallback is not None
    loaded = load_source(source, quantization, dtype=dtype, device=device)
    names = _names(files)
    for one, label in zip(files, names, strict=True):
        put_adapter(loaded, one, label)
    voices = [Voice(label, str(given), one or fallback) for label, given, one in zip(names, adapters, own, strict=True)]
    if voices:
        activate(loaded, voices[0].name)
    return loaded.eval(), [*voices, Voice(BASE, None, fallback)]


_OTHER_BITS = "Leave `bits` out, or merge the adapter: qlora merge --base original"


def _names(files: Sequence[AdapterFiles]) -> list[str]:
    """Short names that differ: the folder's, or for `runs/x/adapter` that of its run; where two are alike, the path."""
    folders = [one.folder.absolute() for one in files]
    short = [
        folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name for folder in folders
    ]
    return [
        name if short.count(name) == 1 and name != BASE else str(folder)
        for name, folder in zip(short, folders, strict=True)
    ]


@contextmanager
def speaking(model: PreTrainedModel, voice: Voice) -> Iterator[PreTrainedModel]:
    """The model as this voice, while entered."""
    if voice.folder is not None:
        if adapters_of(model).active != voice.name:
            activate(model, voice.name)
        yield model
    else:
        with disabled(model):
            yield model
