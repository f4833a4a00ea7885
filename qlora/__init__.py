"""Fine-tuning in 4 bits with LoRA and DoRA. The names below are the Python interface; each loads its module when used.

`import qlora` itself imports nothing, so that `qlora --help` need not wait for torch. No module directly in this
package has the name of a function below: importing a submodule sets it as an attribute of the package, which would
put the module in the function's place. The alternative, to import everything here, makes every command wait for
transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "FinetuneConfig": "config.commands",
    "UserError": "errors",
    "load_base": "models.load",
    "load_tokenizer": "models.source",
    "AdapterSpec": "specs",
    "Quantization": "specs",
    "quantize_": "layers.linear",
    "attach": "layers.attach",
    "attach_adapters": "layers.attach",
    "activate": "layers.attach",
    "detach": "layers.attach",
    "disabled": "layers.attach",
    "adapters_of": "layers.attach",
    "mixed": "layers.mixed",
    "combine": "layers.combine",
    "adapter_parameters": "layers.attach",
    "named_adapters": "layers.attach",
    "save_adapter": "export.peft_write",
    "load_adapter": "export.peft",
    "PagedAdamW": "optim.adamw",
    "finetune": "run.recipe",
    "merge": "export.formats",
    "export_adapter": "export.formats",
    "ExportSpec": "specs",
    "VerifySpec": "specs",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """The name, from the module where it lives; the version from the installed package's metadata."""
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("qlora-trainer")
        except metadata.PackageNotFoundError:  # run from a checkout
            return "0+unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
