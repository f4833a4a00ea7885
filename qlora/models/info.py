"""What we know of a model in memory: the one attribute `qlora` that we put on it.

    info(model).base      how its frozen weights were made, for adapter files and their checks
    info(model).adapters  the adapters on it (`layers.attach`)
    info(model).mode      how it runs in training (`layers.forward_mode`)
    info(model).unreached the adapters that got no gradient in a trial step (`train.trial`)

The alternative, a table of weak references beside the models, loses the record when a model is copied or pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from qlora.errors import UserError, problem, shortened
from qlora.specs import DTYPE_NAMES, Quantization


@dataclass(frozen=True)
class BaseInfo:
    """Where a base came from and how it was made: enough to make it again. `fingerprint` identifies the weights (see
    `models.quantize.Fingerprint`), `vocabulary` is the number of rows of the embedding.

    `scales` is None for a checkpoint that was NF4 already, which does not tell. Adapters from before that field had
    absmax. `stored` is the type of the weights that were quantized (bf16, fp16, fp32), as the checkpoint holds them: a
    base does not depend on what the machine computes in. `cast` is the type that they were cast to first. Adapters
    from before these fields had weights cast to `dtype`.

    An adapter that PEFT wrote names only the model: then all other fields are None.
    """

    model: str | None = None
    revision: str | None = None
    bits: int | None = None
    blocksize: int | None = None
    double_quant: bool | None = None
    dtype: str | None = None
    fingerprint: str | None = None
    scales: str | None = "absmax"
    vocabulary: int | None = None
    stored: str | None = None
    cast: str | None = None

    @property
    def cast_to(self) -> str | None:
        """The type that weights were rounded to before they were quantized, None for none."""
        return self.cast or (self.dtype if self.stored is None and self.bits == 4 else None)

    def __post_init__(self) -> None:
        """Raises TypeError for a value that is not of its field's type: they are read from files."""
        for field in fields(self):
            value, names = getattr(self, field.name), str(field.type).split(" | ")
            if type(value).__name__.replace("NoneType", "None") not in names:
                raise TypeError(f"{field.name} is {type(value).__name__}, not {field.type}")
        for name in ("dtype", "stored", "cast"):
            if getattr(self, name) not in (None, *DTYPE_NAMES):
                raise ValueError(
                    f"{name} is {shortened(repr(getattr(self, name)), 40)}, and none of {', '.join(DTYPE_NAMES)}"
                )

    def quantization(self, packed: bool) -> Quantization:
        """What makes these weights again from a checkpoint; `packed`: one that is NF4 already."""
        if self.bits != 4 or packed:
            return Quantization(self.bits or 16)
        return Quantization(4, self.blocksize, self.double_quant, self.scales, self.cast_to)


@dataclass
class ModelInfo:
    """The attribute `qlora` of a model. `adapters` belongs to `layers.attach`, `mode` to `layers.forward_mode` and
    `unreached` to `train.trial`, which alone write them.
    """

    base: BaseInfo | None = None
    adapters: Any = None
    mode: Any = None
    unreached: tuple[str, ...] = ()


def info(model: nn.Module) -> ModelInfo:
    """The record of this very module (not of one that it wraps), made at the first call."""
    found: ModelInfo = vars(model).setdefault("qlora", ModelInfo())
    return found


def base_info(model: nn.Module) -> BaseInfo:
    """How the base was made, of a model that `load_base` loaded.

    Raises:
        UserError: it was loaded by something else.
    """
    base = info(model).base
    if base is None:
        raise UserError(problem("model", type(model).__name__, "was not loaded by `load_base`", "Load it with that"))
    return base
