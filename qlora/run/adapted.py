"""A model ready to generate or to be evaluated: an adapter on the base it was trained on, or a bare base.

    qlora.json -> base (name, bits, block size, dtype) -> load_source -> put_adapter -> tokenizer of the adapter

The alternative, to ask for the options of the training again, would load other weights where one is forgotten.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.errors import UserError, problem
from qlora.export.peft import adapter_tokenizer, put_adapter, read_adapter
from qlora.models.info import BaseInfo
from qlora.models.load import load_source
from qlora.models.source import load_tokenizer, resolve
from qlora.specs import Quantization


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
        UserError: see `load_base` and `load_adapter`; an adapter that names no base, or was trained on other `bits`.
    """
    files = None if adapter is None else read_adapter(adapter)
    trained = BaseInfo() if files is None else files.base
    if trained.bits is not None and bits not in (None, trained.bits):
        rule = f"the adapter was trained on {trained.bits} bits"
        remedy = "Leave `bits` out, or merge the adapter: qlora merge --base original"
        raise UserError(problem("bits", bits, rule, remedy))
    name, revision = (trained.model, trained.revision) if model is None else (model, None)
    if name is None:
        raise UserError(problem("adapter", adapter, "does not name its base model", "Give `model` too"))
    source = resolve(name, revision, trust_remote_code=trust_remote_code)
    quantization = Quantization(bits or 4)
    if trained.bits is not None:
        quantization = trained.quantization(source.packed)
        dtype = trained.dtype if dtype == "auto" and trained.dtype else dtype
    tokenizer = None if files is None else adapter_tokenizer(files.folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    loaded = load_source(source, quantization, dtype=dtype, device=device)
    if files is not None:
        put_adapter(loaded, files)
    return loaded.eval(), tokenizer
