"""`save_pretrained` of a model of ours, in the place of transformers': what it writes can be loaded.

    model.save_pretrained(folder)  ->  export.pretrained.save_pretrained(model, folder)

transformers' own would write codes and A beside each other under names that only this very object has. The writers lie
above the floors where models are made and get adapters, so theirs is found by name when it is called. It holds its
model weakly: a circle would keep a model that nobody has any more until Python's collector comes by. The alternative,
a subclass of every model's class, changes what code that looks at the class finds.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from torch import nn

from qlora.errors import UserError


class Saver:
    """The method `save_pretrained` of one model; it is copied and pickled with the model."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """See `export.pretrained.save_pretrained`.

        Raises:
            UserError: nobody holds the model any more, as in `load_base(...).save_pretrained(folder)`.
        """
        model = self._model()
        if model is None:
            rule = "model: nothing holds it any more, so it is gone before it is saved"
            raise UserError(f"{rule}. Give it a name first: `model = load_base(...)`.")
        importlib.import_module("qlora.export.pretrained").save_pretrained(model, save_directory, *args, **options)


def saves_what_loads(model: nn.Module) -> None:
    """Give a transformers model our `save_pretrained`; other modules have none."""
    if hasattr(type(model), "save_pretrained"):
        vars(model)["save_pretrained"] = Saver(model)
