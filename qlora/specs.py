"""What a run is made of, as whole objects: how weights are quantized, what the adapter is, how the optimizer steps.

`config.commands` cuts them from its options once (`config.quantization()`, `.adapter()`, `.optimizer()`); whoever builds a
part takes the object, not a list of its fields. They hold no torch, so that options and `--help` need none. The
alternative, to hand the config itself down, ties every layer to every option of the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are kept: `bits` 4 (NF4) or 16. None stands for the default of weights to quantize, and for
    what a checkpoint that is NF4 already holds; what is given must agree with it."""

    bits: int = 4
    blocksize: int | None = None  # weights that share a scale; 64
    double_quant: bool | None = None  # scales in 8 bits; True
    scales: str | None = None  # "absmax" or "mse"; "absmax"


@dataclass(frozen=True)
class AdapterSpec:
    """A kind of adapter. `targets` is what was asked for; `modules` are the names that it meant in a model, once attached."""

    method: str = "dora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    modules: tuple[str, ...] = ()

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
