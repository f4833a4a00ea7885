"""What a run is made of, as whole objects: how weights are quantized, what the adapter is, how the optimizer steps.

`config.commands` cuts them from its options once (`config.quantization()`, `.adapter()`, `.optimizer()`); whoever
builds a part takes the object, not a list of its fields. Defaults and ranges are declared here, at the field, and
`config.commands` takes them from here (`declared`), so that the command line and a Python caller are held to the same.
They hold no torch, so that options and `--help` need none. The alternative, to hand the config itself down, ties every
layer to every option of the command line.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qlora.errors import problem

Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
BLOCKSIZES: tuple[int, ...] = get_args(Blocksize)
DTYPE_NAMES = ("bf16", "fp16", "fp32")
Scales = Literal["absmax", "mse"]
SCALES: tuple[str, ...] = get_args(Scales)
Codes = Literal["nearest", "gptq"]
Method = Literal["lora", "dora"]
METHODS: tuple[str, ...] = get_args(Method)
Init = Literal["kaiming", "gaussian"]
INITS: tuple[str, ...] = get_args(Init)
ExportFormat = Literal["hf", "bnb4-lora", "bnb4", "gguf", "gguf-lora"]
GGUFType = Literal["auto", "F16", "BF16", "Q8_0", "Q4_0"]
MergeBase = Literal["dequantized", "original", "best"]
MERGE_BASES: tuple[str, ...] = get_args(MergeBase)


def limited(default: Any, **limits: float) -> Any:
    """A field with a range: `ge`, `gt` (at least, above), `le`, `lt` (at most, below)."""
    return field(default=default, metadata={"limits": limits})


def declared(spec: type, name: str) -> dict[str, Any]:
    """The default and the range of a field, as `config.options.option` takes them."""
    entry = next(entry for entry in dataclasses.fields(spec) if entry.name == name)
    return {"default": entry.default, **entry.metadata.get("limits", {})}


_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def _range_problems(spec: Any) -> list[str]:
    """A line for every field with a range whose value is no number in it, a whole one where its default is; and for
    every switch that is neither on nor off.
    """
    problems = []
    for entry in dataclasses.fields(spec):
        limits, value = entry.metadata.get("limits"), getattr(spec, entry.name)
        if isinstance(entry.default, bool) and not isinstance(value, bool):
            problems.append(problem(entry.name, value, "must be True or False", f"The default is {entry.default}"))
        if limits is None:
            continue
        whole = isinstance(entry.default, int)
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not all(_BOUNDS[key][0](value, limits[key]) for key in limits):
            words = " and ".join(f"{_BOUNDS[key][1]} {limit:g}" for key, limit in limits.items())
            rule = f"must be a {'whole ' if whole else ''}number {words}"
            problems.append(problem(entry.name, value, rule, f"The default is {entry.default:g}"))
    return problems


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are kept: `bits` 4 (NF4) or 16.

    None stands for the default of weights to quantize, and for what a checkpoint that is NF4 already holds; what is
    given must agree with it.
    """

    bits: int = 4
    blocksize: int | None = None  # weights that share a scale
    double_quant: bool | None = None  # scales in 8 bits
    scales: str | None = None  # "absmax" or "mse"
    cast_to: str | None = (
        None  # bf16, fp16, fp32: what weights were rounded to first; None: quantized as they are stored
    )

    def problems_of_nf4(self) -> list[str]:
        """`problems`, for who quantizes whatever `bits` says."""
        sixteen = problem("bits", 16, "leaves every weight as it is, and this quantizes to NF4", "Use `bits=4`")
        return [*self.problems(), *([sixteen] if self.bits == 16 else [])]

    def resolved(self) -> ResolvedQuantization:
        """With the defaults of weights to quantize in the place of None."""
        given: dict[str, Any] = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return ResolvedQuantization(**given)

    def problems(self) -> list[str]:
        """A line for every value that no weights can have."""
        found = []
        if self.bits not in (4, 16):
            found.append(problem("bits", self.bits, "must be 4 or 16", "4 quantizes to NF4, 16 keeps 16-bit weights"))
        if self.blocksize is not None and self.blocksize not in BLOCKSIZES:
            remedy = "64 is the usual choice"
            found.append(problem("blocksize", self.blocksize, f"must be one of {BLOCKSIZES}", remedy))
        if self.scales is not None and self.scales not in SCALES:
            remedy = "absmax is the usual choice"
            found.append(problem("scales", self.scales, f"must be {' or '.join(SCALES)}", remedy))
        if self.cast_to not in (None, *DTYPE_NAMES) or (self.cast_to and self.bits == 16):
            rule = "must be bf16, fp16 or fp32, and is for `bits=4`"
            found.append(problem("cast_to", self.cast_to, rule, "Leave it out: weights are quantized as stored"))
        return found


@dataclass(frozen=True)
class ResolvedQuantization(Quantization):
    """How certain weights are kept, with nothing left open; the defaults are those of weights to quantize.

    `scales` is None for a checkpoint that is NF4 already: its file does not tell.
    """

    blocksize: int = 64
    double_quant: bool = True
    scales: str | None = "absmax"


@dataclass(frozen=True)
class AdapterSpec:
    """A kind of adapter. `targets` is what was asked for; `modules` are the layers that it meant, once attached."""

    method: str = "dora"
    rank: int = limited(16, ge=1)
    alpha: float = limited(32.0, gt=0)
    dropout: float = limited(0.0, ge=0, lt=1)
    rslora: bool = False
    init: str = "kaiming"  # how A is drawn: uniform, or "gaussian": normal with standard deviation 1 / rank
    targets: str | tuple[str, ...] = field(default="all-linear", compare=False)  # other words for the same modules
    modules: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def to_peft(self) -> dict[str, Any]:
        """These fields as PEFT's LoraConfig names them."""
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "use_dora": self.method == "dora",
            "use_rslora": self.rslora,
            "init_lora_weights": self.init == "kaiming" or self.init,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], modules: Iterable[str]) -> AdapterSpec:
        """What a LoraConfig says, of an adapter on these modules."""
        return cls(
            method="dora" if config.get("use_dora") else "lora",
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            modules=tuple(modules),
        )

    def problems(self) -> list[str]:
        """A line for every value that no adapter can have."""
        found = []
        for name, known in (("method", METHODS), ("init", INITS)):
            if getattr(self, name) not in known:
                default = declared(AdapterSpec, name)["default"]
                rule = f"must be one of {', '.join(known)}"
                found.append(problem(name, getattr(self, name), rule, f"{default} is the default"))
        return found + _range_problems(self)


@dataclass(frozen=True)
class ExportSpec:
    """How an adapter is written for others to serve: `to` names a row of `export.formats.FORMATS`, which says what of
    the rest has a meaning there.
    """

    to: str = "hf"
    base: str = "dequantized"  # what is merged into: the values that training saw, the checkpoint's own, or the closer
    dtype: str = "auto"  # of weights that are not quantized; auto: bf16 for "hf", else what the training computed in
    double_quant: bool = False  # of "bnb4-lora": its rescaled constants in 8 bits again
    shard_size: int = limited(10**9, ge=1)  # bytes of the largest file
    type: str = "auto"  # of the matrices in a GGUF file; auto: F16 for "gguf", for "gguf-lora" see `write_gguf_lora`

    def problems(self) -> list[str]:
        """A line for every number or switch that no export can have; what suits which format, `export.formats` says."""
        return _range_problems(self)


@dataclass(frozen=True)
class VerifySpec:
    """How an export is held against the adapted model.

    None: texts of our own; the limit of the format (`export.verify.usual_limit`).
    """

    data: str | None = None
    max_kl: float | None = None  # nats a token

    def problems(self) -> list[str]:
        """A line for a limit that is none: against NaN everything is close."""
        number = isinstance(self.max_kl, (int, float)) and not isinstance(self.max_kl, bool)
        if self.max_kl is None or (number and math.isfinite(self.max_kl) and self.max_kl > 0):
            return []
        return [problem("max_kl", self.max_kl, "must be a number above 0", "Leave it out for the format's own limit")]


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (arXiv:1711.05101) and where its state lies: `memory` and `state` as in `optim.adamw.PagedAdamW`."""

    learning_rate: float = limited(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = limited(1e-8, gt=0)
    weight_decay: float = limited(0.0, ge=0)
    memory: int | str = "auto"
    state: Literal["float32", "8bit"] = "float32"
