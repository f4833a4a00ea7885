"""Loading a base model, quantizing tensor by tensor as it streams in.

    Source -> stream(visit): every tensor passes once, under its name in the model -> load_base, merging, `qlora
    quantize`

`stream` hands transformers a quantizer whose only conversion is our `visit(name, tensor)`; transformers does what it
knows best (architectures, renamed and sharded checkpoints, tied weights, non-persistent buffers) and never holds more
than one unquantized tensor. Loading quantizes in `visit`; merging and `qlora quantize` write to shards in it and keep
nothing.
The alternative not taken: a loader of our own for each architecture.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora import nf4
from qlora.adapters import LINEAR, linear_names
from qlora.errors import UserError, problem
from qlora.fused import fuse
from qlora.linear import NF4Linear
from qlora.nf4 import NF4Weight
from qlora.sources import SMOLLM2, PackedTensor, Source, lazy_tensors, load_config, packed_layers, resolve
from qlora_kernels import ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseRecipe:
    """Where a base came from and how it was made: enough to make it again. `fingerprint` identifies the weights.

    `scales` is None for a checkpoint that was NF4 already, which does not tell. Adapters from before that field had
    absmax.
    """

    model: str
    revision: str | None
    bits: int
    blocksize: int
    double_quant: bool
    dtype: str
    fingerprint: str
    scales: str | None = "absmax"

    def quantization(self, source: Source) -> dict[str, int | bool | str | None]:
        """The options for `LinearLayers` that make these weights from `source` again; none where it needs none."""
        if self.bits != 4 or source.packed:
            return {}
        return {"blocksize": self.blocksize, "double_quant": self.double_quant, "scales": self.scales}


# ---------------------------------------------------------------- what runs where


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(problem("device", device, "is no torch device", "Use auto, cpu, cuda or cuda:0")) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            problem("device", device, "torch sees no CUDA device here", "Use --device cpu, and run: qlora doctor")
        )
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """ "auto" is bf16 where the device multiplies bf16 natively, else fp32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if native_bf16_cpu() else "fp32"


def native_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---------------------------------------------------------------- streaming


@register_quantization_config("qlora_stream")
class _StreamConfig(QuantizationConfigMixin):
    def __init__(self, prepare=None, wants=None, visit=None):
        self.quant_method = "qlora_stream"
        self.prepare, self.wants, self.visit = prepare, wants, visit

    def to_dict(self):
        return {"quant_method": self.quant_method}


@register_quantizer("qlora_stream")
class _StreamQuantizer(HfQuantizer):
    """Runs `visit` on each tensor of the checkpoint that `wants` names, in place of a quantization."""

    is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.quantization_config.prepare(model)
        # transformers 5.17 casts each tensor to the dtype of its place before it is visited, and the place of codes is
        # uint8.
        self.codes = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)
        }
        for module in self.codes.values():
            module.weight = torch.empty_like(module.weight, dtype=model.dtype)

    def param_element_size(self, model, param_name, param):  # of what is loaded, for an allocation beforehand on a GPU
        return 1 if param_name in self.codes else param.element_size()

    def param_needs_quantization(self, model, param_name, **kwargs):
        return self.quantization_config.wants(param_name)

    def get_quantize_ops(self):
        return _Visit(self.quantization_config.visit)

    def is_serializable(self, *args, **kwargs):
        return False


class _Visit(ConversionOps):
    def __init__(self, visit):
        self.visit = visit

    def convert(self, input_dict, **kwargs):
        result = {}
        for name, value in input_dict.items():
            result |= self.visit(name, value[0] if isinstance(value, list) else value)
        return result


def stream(
    source: Source,
    visit: Callable[[str, object], dict[str, Tensor]],
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    wants: Callable[[str], bool] = lambda name: True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, passing each checkpoint tensor that `wants` names through `visit(name, tensor)`,
    which returns what to put into the model, by full name. `dtype` is that of the tensors ("auto": as stored);
    `prepare(model)` sees the empty model first.

    Raises:
        UserError: the checkpoint lacks tensors, has them in other shapes, or `visit` found something wrong.
        OSError: what `visit` writes could not be written.
    """
    config = load_config(source, trust_remote_code)
    problems: list[str] = []
    unwritten: list[OSError] = []

    def guarded(name: str, value: object) -> dict[str, Tensor]:
        try:
            return visit(name, value)
        except (
            UserError
        ) as error:  # transformers turns an exception here into a report of its own; ours is raised below
            problems.extend(error.problems)
            raise
        except OSError as error:
            unwritten.append(error)
            raise

    shapes: dict[str, torch.Size] = {}

    def prepared(model: nn.Module) -> None:
        prepare(model)
        shapes.update((name, parameter.shape) for name, parameter in model.named_parameters())

    options = dict(
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=_StreamConfig(prepared, wants, guarded),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they come back in the info and are refused below, all of them with the rest
    )
    lazy = lazy_tensors(source, config, dtype)
    try:
        if lazy is None:
            model, info = AutoModelForCausalLM.from_pretrained(
                source.folder, weights_only=True, trust_remote_code=trust_remote_code, **options
            )
        else:
            with torch.device("meta"):  # AutoModel takes no state dict, the class itself does
                architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
            model, info = architecture.from_pretrained(None, state_dict=lazy, **options)
    except (RuntimeError, OSError, ValueError) as error:
        if problems:
            raise UserError(problems) from None
        if unwritten:
            raise unwritten[0] from None
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, UserError):
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                problem(
                    "model",
                    source.gguf or source.folder,
                    f"cannot be loaded ({reason})",
                    "Check that the folder is whole",
                )
            ) from error
        raise
    problems += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    misfits = {name: (found, needed) for name, found, needed in info["mismatched_keys"]}
    # transformers 5.17 does not look at shapes where there is a quantizer.
    misfits |= {
        name: (p.shape, shapes[name]) for name, p in model.named_parameters() if p.shape != shapes.get(name, p.shape)
    }
    problems += [
        f"{name} is {tuple(found)}, the model needs {tuple(needed)}"
        for name, (found, needed) in sorted(misfits.items())
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            problem(
                "model",
                source.gguf or source.folder,
                f"the checkpoint does not fit its config ({shown})",
                "Get the whole checkpoint again",
            )
        )
    _forget_quantizer(model)
    return model


def _forget_quantizer(model: PreTrainedModel) -> None:
    """An ordinary model again: Trainer and save_pretrained refuse models that a quantizer has marked."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False
            if hasattr(module.config, "quantization_config"):
                del module.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False


# ---------------------------------------------------------------- the base model


def load_base(
    model: str,
    *,
    bits: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    blocksize: int | None = None,
    double_quant: bool | None = None,
    scales: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A frozen base model from a folder, a .gguf file, a hub id or "smollm2-135m", with every linear layer but the head
    in NF4 (`bits=4`) or as it is (`bits=16`). Peak memory: the result and about two of its largest tensors.
    `blocksize`, `double_quant` and `scales` (None: see `LinearLayers`) are those of `nf4.quantize`.

    Returns an ordinary transformers model in evaluation mode; `model.qlora_base` records how it was made.

    Raises:
        UserError: nothing to load, a checkpoint that is incomplete or contradicts the options, or NaN or inf in a
        weight (named).
    """
    if bits not in (4, 16):
        raise UserError(problem("bits", bits, "must be 4 or 16", "4 quantizes to NF4, 16 keeps 16-bit weights"))
    source = resolve(model, revision)
    place = resolve_device(device)
    dtype = resolve_dtype(dtype, place)
    layers = LinearLayers(source, bits, blocksize, double_quant, scales)
    bound_kernel_caches()
    loaded = stream(
        source,
        layers.visit,
        dtype=DTYPES[dtype],
        device=place,
        prepare=layers.prepare,
        wants=layers.wants,
        trust_remote_code=trust_remote_code,
    )
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    # A local path is kept whole: the adapter must find its base from any folder.
    name = str(Path(model).expanduser().absolute()) if model != SMOLLM2 and Path(model).expanduser().exists() else model
    loaded.qlora_base = BaseRecipe(
        name, revision, bits, layers.blocksize, layers.double_quant, dtype, layers.fingerprint(), layers.scales
    )
    if ops.fuses(place):
        fuse(loaded)
    return loaded.eval()


def bound_kernel_caches() -> None:
    """Let oneDNN, which multiplies on a CPU, keep few of the kernels that it compiles, one for each shape. A
    micro-batch of another
    number of tokens has other shapes: 25 MB more of kernels for SmolLM2, and with 1024 kept in each of two caches, the
    default, 900 MB after 40 batches of real data. These numbers are several times what the layers of one micro-batch
    need, and as fast: what is evicted is seldom asked for again. Works before the first product; what the environment
    already says stands.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


class LinearLayers:
    """The linear weights of a model as they stream by: which there are, their NF4 form, and a fingerprint of them all.

    An option that is None is 64, True or "absmax" for weights to quantize, and what the file holds for a checkpoint
    that is NF4 already (`scales` stays None there: the file does not tell). The resolved values are the attributes of
    the same names.

    Raises:
        UserError: an option was given that is impossible, has no effect on 16 bits, or contradicts the checkpoint.
    """

    def __init__(
        self,
        source: Source,
        bits: int,
        blocksize: int | None = None,
        double_quant: bool | None = None,
        scales: str | None = None,
    ):
        self.packed = packed_layers(source) if source.packed else None
        given = {"blocksize": blocksize, "double_quant": double_quant, "scales": scales}
        held = [dict(zip(given, (*layer, None), strict=True)) for layer in (self.packed or {}).values()]
        problems = []
        if self.packed is not None and bits == 16:
            problems.append(
                problem("bits", bits, "this checkpoint is NF4 already", "Use --bits 4, or the 16-bit original")
            )
        for name, value in given.items():
            found = {layer[name] for layer in held} - {value}
            if value is not None and bits == 16:
                problems.append(
                    problem(name, value, "has no effect on 16-bit weights", "Leave it out, or use --bits 4")
                )
            elif value is not None and found:
                what = "" if found == {None} else f" with {name}={', '.join(map(str, sorted(found)))}"
                problems.append(
                    problem(
                        name, value, f"this checkpoint is NF4 already{what}", "Leave it out, or use the 16-bit original"
                    )
                )
        defaults = held[0] if held else {"blocksize": 64, "double_quant": True, "scales": "absmax"}
        self.bits = bits
        self.blocksize, self.double_quant, self.scales = (
            defaults[name] if value is None else value for name, value in given.items()
        )
        if not held:
            problems += nf4.option_problems(self.blocksize, self.scales)
        if problems:
            raise UserError(problems)
        self.shapes: dict[str, tuple[int, int]] = {}  # [out, in] by layer
        self.transposed: set[str] = set()
        self.samples: dict[str, bytes] = {}

    def note(self, model: nn.Module) -> None:
        """Note the linear layers of the empty model."""
        for name in linear_names(model) if self.packed is None else self.packed:
            layer = model.get_submodule(name)
            if not isinstance(layer, LINEAR):
                raise UserError(
                    problem(
                        "model",
                        name,
                        "is quantized in the checkpoint but is no linear layer of the model",
                        "Use the 16-bit original",
                    )
                )
            self.shapes[name] = (layer.weight.shape[0], layer.weight.shape[1])
            if isinstance(layer, Conv1D):
                self.transposed.add(name)
                self.shapes[name] = self.shapes[name][::-1]

    def prepare(self, model: nn.Module) -> None:
        """Note them and, with 4 bits, put NF4Linear in their places."""
        self.note(model)
        if self.bits == 4:
            for name, (out, columns) in self.shapes.items():
                layer = model.get_submodule(name)
                blocksize, double_quant = (
                    (self.blocksize, self.double_quant) if self.packed is None else self.packed[name]
                )
                with torch.device("meta"):
                    replacement = NF4Linear(columns, out, layer.bias is not None, blocksize, double_quant)
                if layer.bias is not None:
                    replacement.bias = layer.bias
                model.set_submodule(name, replacement)

    def wants(self, name: str) -> bool:
        """Whether the parameter `name` belongs to a layer noted here (its weight or, once quantized, a constant of it)."""
        layer, _, part = name.rpartition(".")
        return layer in self.shapes and part != "bias"

    def quantized(self, name: str, value) -> NF4Weight:
        """The NF4 form of the weight parameter `name`; records its sample."""
        layer = name.removesuffix(".weight")
        if isinstance(value, PackedTensor):
            weight = value.load()
            step = nf4.row_chunk(weight, 1)
            self.sample(layer, nf4.dequantize(nf4.rows(weight, 0, step)))
            return weight
        oriented = value.t().contiguous() if layer in self.transposed else value
        if oriented.shape != self.shapes[layer]:
            raise UserError(
                problem(
                    name,
                    tuple(oriented.shape),
                    f"the model needs {self.shapes[layer]}",
                    "Get the checkpoint that belongs to this config",
                )
            )
        self.sample(layer, oriented)
        return nf4.quantize(oriented, self.blocksize, self.double_quant, name, self.scales)

    def sample(self, layer: str, weight: Tensor) -> None:
        """Remember the first values of `weight` [out, in] for the fingerprint."""
        values = weight[0, :256].to(torch.bfloat16).contiguous().cpu()
        self.samples[layer] = str(tuple(weight.shape[1:])).encode() + values.view(torch.uint8).numpy().tobytes()

    def visit(self, name: str, value) -> dict[str, Tensor]:
        """For `stream`: the buffers of the NF4 layer, or the weight as it is."""
        layer = name.removesuffix(".weight")
        if self.bits == 16:
            self.sample(layer, value.t() if layer in self.transposed else value)
            return {name: value}
        weight = self.quantized(name, value)
        parts = {name: weight.packed, f"{layer}.absmax": weight.absmax}
        if weight.nested_absmax is not None:
            parts |= {f"{layer}.nested_absmax": weight.nested_absmax, f"{layer}.nested_offset": weight.nested_offset}
        return parts

    def fingerprint(self) -> str:
        """A hash over names, widths and first values of every linear weight: tells bases apart, not every byte of them."""
        digest = hashlib.sha256()
        for name in sorted(self.samples):
            digest.update(name.encode() + self.samples[name])
        return digest.hexdigest()[:32]
