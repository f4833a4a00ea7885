"""What a run is made of, as whole objects: how weights are quantized, what the adapter is, how the optimizer steps.

`config.commands` cuts them from its options once (`config.quantization()`, `.adapter()`, `.optimizer()`); whoever
builds a part takes the object, not a list of its fields. They hold no torch, so that options and `--help` need none.
The alternative, to hand the config itself down, ties every layer to every option of the command line.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from qlora.errors import problem

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALES = ("absmax", "mse")
METHODS = ("lora", "dora")


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are kept: `bits` 4 (NF4) or 16. None stands for the default of weights to quantize, and
    for what a checkpoint that is NF4 already holds; what is given must agree with it.
    """

    bits: int = 4
    blocksize: int | None = None  # weights that share a scale; 64
    double_quant: bool | None = None  # scales in 8 bits; True
    scales: str | None = None  # "absmax" or "mse"; "absmax"

    def resolved(self) -> Quantization:
        """With the defaults of weights to quantize in the place of None."""
        defaults = {"blocksize": 64, "double_quant": True, "scales": "absmax"}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def problems(self) -> list[str]:
        """What is wrong with the values by themselves, None left out."""
        found = []
        if self.bits not in (4, 16):
            found.append(problem("bits", self.bits, "must be 4 or 16", "4 quantizes to NF4, 16 keeps 16-bit weights"))
        if self.blocksize not in (None, *BLOCKSIZES):
            found.append(problem("blocksize", self.blocksize, f"must be one of {BLOCKSIZES}", "64 is the usual choice"))
        if self.scales not in (None, *SCALES):
            rule = f"must be {' or '.join(SCALES)}"
            found.append(problem("scales", self.scales, rule, "absmax is the usual choice"))
        return found


@dataclass(frozen=True)
class AdapterSpec:
    """A kind of adapter. `targets` is what was asked for; `modules` are the names that it meant in a model, once
    attached.
    """

    method: str = "dora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    modules: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with the values by themselves."""
        found = []
        if self.method not in METHODS:
            found.append(problem("method", self.method, f"must be one of {', '.join(METHODS)}", "dora is the default"))
        if not (isinstance(self.rank, int) and self.rank >= 1):
            found.append(problem("rank", self.rank, "must be a whole number of at least 1", "16 is a usual choice"))
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            found.append(problem("alpha", self.alpha, "must be a positive number", "Twice the rank is a usual choice"))
        if not 0 <= self.dropout < 1:
            found.append(problem("dropout", self.dropout, "must be at least 0 and below 1", "0 is a usual choice"))
        return found

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (arXiv:1711.05101) and where its state lies: `memory` and `state` as in `optim.adamw.PagedAdamW`."""

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    memory: int | str = "auto"
    state: Literal["float32", "8bit"] = "float32"
