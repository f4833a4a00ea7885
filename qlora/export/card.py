"""The model card of an adapter: README.md with the front matter that the hub reads.

The front matter is huggingface_hub's ModelCardData, which quotes any name as YAML wants it. The alternative, its
ModelCard with a Jinja template, would bring a template language in for one page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from qlora.models.info import BaseInfo
from qlora.specs import AdapterSpec

PAGE = """---
{front}
---

# A {kind} adapter of {title}

Trained with `qlora` on {base}.

| | |
|---|---|
{table}

## How to use it

With qlora, which loads the base exactly as it was in training (`qlora.json`):

    qlora generate --adapter THIS_FOLDER --prompt "..."
    qlora merge --adapter THIS_FOLDER --output MERGED

With PEFT, on a base that you load yourself:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base, "THIS_FOLDER")
"""


def model_card(name: str | None, spec: AdapterSpec, base: BaseInfo | None, notes: Mapping[str, Any]) -> str:
    """The text of README.md. `name`: the base model; `notes`: what else to say of the run, a row each."""
    kind = {"lora": "LoRA", "dora": "DoRA"}[spec.method]
    kind = f"Q{kind}" if base is not None and base.bits == 4 else kind
    front = ModelCardData(
        base_model=name, library_name="peft", pipeline_tag="text-generation", tags=[spec.method, "qlora"]
    )
    rows = {"method": _method(kind, spec), "adapted layers": _layers(spec), "base weights": _weights(base)}
    for key, value in notes.items():
        rows[key.replace("_", " ")] = f"{value:.5g}" if isinstance(value, float) else value
    return PAGE.format(
        front=front.to_yaml(),
        kind=kind,
        title=name.rstrip("/").rsplit("/", 1)[-1] if name else "a causal language model",
        base=f"`{name}`" if name else "a model without a name",
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None),
    )


def _method(kind: str, spec: AdapterSpec) -> str:
    scaled = f"alpha {spec.alpha:g}{', rsLoRA' if spec.rslora else ''}"
    return f"{kind}, rank {spec.rank}, {scaled}, dropout {spec.dropout:g}"


def _layers(spec: AdapterSpec) -> str:
    return f"{len(spec.modules)}: " + ", ".join(sorted({name.rsplit(".", 1)[-1] for name in spec.modules}))


def _weights(base: BaseInfo | None) -> str | None:
    if base is None or base.bits != 4:
        return None if base is None else base.dtype
    how = ", double quantization" if base.double_quant else ""
    how += ", scales of least squared error" if base.scales == "mse" else ""
    return f"NF4, block size {base.blocksize}{how}, computed in {base.dtype}"
