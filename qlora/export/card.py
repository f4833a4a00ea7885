"""TODO head of export.card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora.models.quantize import BaseRecipe
from qlora.specs import AdapterSpec


def model_card(name: str | None, spec: AdapterSpec, base: BaseRecipe | None, notes: Mapping[str, Any]) -> str:
    """The model card. Strings in the front matter are quoted as JSON, which is YAML too."""
    kind = {"lora": "LoRA", "dora": "DoRA"}[spec.method]
    kind = f"Q{kind}" if base is not None and base.bits == 4 else kind
    shown = f"`{name}`" if name else "a model without a name"
    scaled = f"alpha {spec.alpha:g}{', rsLoRA' if spec.rslora else ''}"
    rows = {
        "method": f"{kind}, rank {spec.rank}, {scaled}, dropout {spec.dropout:g}",
        "adapted layers": f"{len(spec.modules)}: " + ", ".join(sorted({m.rsplit(".", 1)[-1] for m in spec.modules})),
    }
    if base is not None and base.bits == 4:
        how = (", double quantization" if base.double_quant else "") + (
            ", scales of least squared error" if base.scales == "mse" else ""
        )
        rows["base weights"] = f"NF4, block size {base.blocksize}{how}, computed in {base.dtype}"
    elif base is not None:
        rows["base weights"] = base.dtype
    for key, value in notes.items():
        if value is not None:
            rows[key.replace("_", " ")] = f"{value:.5g}" if isinstance(value, float) else str(value)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags:", f"- {spec.method}", "- qlora"]
    if name:
        front.insert(0, f"base_model: {json.dumps(name)}")
    return f"""---
{chr(10).join(front)}
---

# A {kind} adapter of {name.rstrip("/").rsplit("/", 1)[-1] if name else "a causal language model"}

Trained with `qlora` on {shown}.

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
