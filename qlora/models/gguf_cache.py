"""What transformers makes of a GGUF file's header, kept as ordinary files: its parse takes seconds at every start.

    <cache>/qlora/gguf/<key>-config/       config.json           <cache>: $XDG_CACHE_HOME or ~/.cache
    <cache>/qlora/gguf/<key>-tokenizer/    tokenizer.json, tokenizer_config.json, ...    each with a manifest

The key is a hash over all that decides the result: the bytes of the header and of rotary factors (not the name or the
time, which a replaced file may share), the files beside it that transformers would look at, versions, and our own
reading. An entry is kept only if reading it back gives the same; a damaged one is made again. The alternative, a reader
of our own for every vocabulary, would repeat what transformers does right.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qlora.errors import UserError, guard
from qlora.files import whole_folder
from qlora.manifest import MANIFEST, damages, versions, write_manifest
from qlora.models import gguf_config, gguf_header, gguf_layout, gguf_splits
from qlora.models.gguf_header import LONG, SHORT, read_header

MOST = 16  # entries, about 3 MB each
_BESIDE = (".json", ".jinja", ".model", ".txt")
_Made = TypeVar("_Made", PretrainedConfig, PreTrainedTokenizerBase)


def cached_config(path: Path, read: Callable[[], PretrainedConfig]) -> PretrainedConfig:
    """`read()`, the config of the GGUF file `path`, or what was kept of an earlier one.

    Raises:
        UserError: see `read`.
    """
    return _cached(path, "config", read, AutoConfig.from_pretrained, _config_facts)


def cached_tokenizer(path: Path, read: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """`read()`, the tokenizer of the GGUF file `path`, or what was kept of an earlier one.

    Raises:
        UserError: see `read`.
    """
    return _cached(path, "tokenizer", read, AutoTokenizer.from_pretrained, _tokenizer_facts)


def _cached(
    path: Path, kind: str, read: Callable[[], _Made], load: Callable[[Path], _Made], facts: Callable[[_Made], Any]
) -> _Made:
    key = _key(path)
    place = None if key is None else _folder() / f"{key}-{kind}"
    found = None if place is None or not place.is_dir() else _kept(place, load, f"It is made again from {path.name}")
    if found is None:
        found = read()
        if place is not None:
            with suppress(UserError, OSError):  # no room, no right, another process, another object: nothing is kept
                found = _keep(found, place, kind, load, facts)
    found.name_or_path = str(path.parent)
    return found


def _kept(place: Path, load: Callable[[Path], _Made], remedy: str) -> _Made | None:
    """What an entry holds; None, and a line, where it is damaged."""
    try:
        with guard("cache", place, "is damaged", remedy):
            if harm := damages(place) if (place / MANIFEST).is_file() else [f"{MANIFEST} is missing"]:
                raise ValueError(harm[0])
            os.utime(place)  # the entry that was longest not asked for goes first
            return load(place)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return None


def _keep(made: _Made, place: Path, kind: str, load: Callable[[Path], _Made], facts: Callable[[_Made], Any]) -> _Made:
    """What the next start will read.

    Raises:
        UserError: it is not the same, or cannot be written.
        OSError: it cannot be written.
    """
    with whole_folder(place) as part, guard("cache", place, "is not what was saved", "Read the GGUF file"):
        made.save_pretrained(part)
        again = load(part)
        if facts(again) != facts(made):
            raise ValueError("its files say something else")
        write_manifest(part, kind, versions(torch.device("cpu")), None, None)
    by_age = sorted((entry for entry in place.parent.glob("*-*") if entry.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in by_age[:-MOST]:
        shutil.rmtree(old, ignore_errors=True)
    return again


def _config_facts(config: PretrainedConfig) -> Any:
    return type(config), {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def _tokenizer_facts(tokenizer: Any) -> Any:
    special = tokenizer.special_tokens_map, {n: str(token) for n, token in tokenizer.added_tokens_decoder.items()}
    sides = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length, tokenizer.model_input_names
    return type(tokenizer), special, sides, tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()


def _folder() -> Path:
    """Where entries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora" / "gguf"


def _key(path: Path) -> str | None:
    """The hash over what decides the result; None where the file cannot be read as GGUF, which its reader will say."""
    try:
        found = path.stat()
        files = [file for file in path.parent.iterdir() if file.suffix in _BESIDE]
        files += (path.parent / "additional_chat_templates").glob("*.jinja")
        beside = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files))
        return _hashed(path, (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns), beside)
    except (OSError, UserError, RuntimeError):  # RuntimeError: there is no home
        return None


@functools.lru_cache(maxsize=8)
def _hashed(path: Path, _: tuple[int, ...], beside: tuple[tuple[str, int, int], ...]) -> str:
    header = read_header(path)
    digest = hashlib.sha256(repr(beside).encode())
    for library in ("transformers", "tokenizers", "gguf"):
        digest.update(importlib.metadata.version(library).encode())
    for module in (gguf_config.__file__, gguf_header.__file__, gguf_layout.__file__, gguf_splits.__file__, __file__):
        digest.update(Path(module).read_bytes())
    begin = min(start for _, start in header.tensors.values())
    with path.open("rb") as file:
        digest.update(file.read(begin))
        for name in ("rope_freqs.weight", LONG, SHORT):
            if name in header.tensors:
                file.seek(header.tensors[name][1])
                digest.update(file.read(4 * max(1, *header.shapes[name])))
    return digest.hexdigest()[:32]
