"""TODO head of run.adapted."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from qlora.errors import UserError, problem
from qlora.export.peft import load_adapter, read_adapter_recipe
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
):
    """(model in eval mode, tokenizer): an adapter on the base it was trained on, or a bare base if `adapter` is None.

    `model` says where the base lies now; `bits` (None: 4) holds where the adapter has nothing to say.

    Raises:
        UserError: see `load_base` and `load_adapter`; an adapter that names no base, or was trained on other `bits`.
    """
    quantization, revision = Quantization(bits or 4), None
    base = None if adapter is None else read_adapter_recipe(adapter)[0]
    if base is not None:
        if base.bits is not None and bits not in (None, base.bits):
            rule = f"the adapter was trained on {base.bits} bits"
            remedy = "Leave --bits out, or merge the adapter: qlora merge --base original"
            raise UserError(problem("bits", bits, rule, remedy))
        if model is None:
            model, revision = base.model, base.revision
        if model is None:
            raise UserError(problem("adapter", adapter, "does not name its base model", "Give --model too"))
    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    if base is not None and base.bits is not None:
        quantization, dtype = base.quantization(source), base.dtype if dtype == "auto" else dtype
    loaded = load_source(source, quantization, dtype=dtype, device=device)
    if adapter is not None:
        load_adapter(loaded, adapter)
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    else:
        tokenizer = load_tokenizer(source)
    return loaded.eval(), tokenizer
