"""manifest.json: what is in a folder of ours, so that what is damaged, mixed or missing is known by name.

    {"format": 1, "kind": "checkpoint", "step": 6, "run": <SHA-256 of what the run is>, "versions": {...},
     "files": {name: {"size": bytes, "sha256": ...}}}

Written last, before the folder gets its name. It covers every file that decides a number: tensors, configurations,
tokenizer, template, optimizer and state. The card (README.md) and files that others add are free, unless a tokenizer
would read them. The alternative, a hash inside each file, does not tell that two files belong together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora import __version__
from qlora.errors import UserError, shortened
from qlora.files import read_json, write_json
from qlora_kernels import backends

MANIFEST, FREE = "manifest.json", ("README.md",)
# Files that tokenizers look for: one of these that was added decides numbers as those do that were there.
_READ_BY_TOKENIZERS = re.compile(
    r"(tokenizer|chat_template|additional_chat_templates|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece)"
)


def versions(device: torch.device) -> dict[str, str]:
    """What computes: `qlora`, `torch`, `transformers`, and the backend for this device."""
    backend = ("native" if backends.NATIVE is not None else "reference") if device.type == "cpu" else None
    return {
        "qlora": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": backend or backends.describe().get(device.type, device.type).split()[0],
    }


def digest_of(run: Mapping[str, Any]) -> str:
    """What a run is, as one SHA-256."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, kind: str, made_by: Mapping[str, str], step: int | None, run: str | None) -> None:
    """Write the manifest of a folder whose other files are all there.

    Args:
        folder: to be covered, but for what is free.
        kind: "adapter" or "checkpoint".
        made_by: see `versions`.
        step: how many steps were taken.
        run: see `digest_of`.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: _entry(path) for name, path in paths.items() if name not in (MANIFEST, *FREE)}
    about = {"format": 1, "kind": kind, "step": step, "run": run, "versions": dict(made_by)}
    write_json(folder / MANIFEST, {**about, "files": files})


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    found = read_json(path)
    if found.get("format") != 1:
        format = shortened(repr(found.get("format")), 40)
        raise UserError(f"{MANIFEST} is damaged, or of a newer version (format {format})")
    entries, step = found.get("files"), found.get("step")
    listed = list(entries.values()) if isinstance(entries, dict) else [None]
    whole = all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in listed)
    if not whole or not isinstance(found.get("versions"), dict) or not (step is None or isinstance(step, int)):
        raise UserError(f"{MANIFEST} is damaged")
    return found


def damages(folder: Path, unread: Collection[str] = ()) -> list[str]:
    """What is not as the manifest says, a few words each; nothing where there is no manifest.

    Args:
        folder: of an adapter or a checkpoint.
        unread: names of files that are not going to be read.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return error.problems
    if manifest is None:
        return []
    found = []
    named = re.fullmatch(r"step-(\d+)", folder.name)
    if named and manifest.get("step") != int(named[1]):
        found.append(f"{MANIFEST} is that of step {manifest.get('step')}, the folder is named {folder.name}")
    for name, entry in manifest["files"].items():
        if name not in unread:
            found += _damage(folder / name, name, entry)
    for path in sorted(folder.iterdir()):
        listed = any(name == path.name or name.startswith(f"{path.name}/") for name in manifest["files"])
        if not listed and _READ_BY_TOKENIZERS.match(path.name):
            found.append(f"{path.name} was added")
    return found


def _damage(path: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    try:
        if not path.is_file():
            return [f"{name} is missing"]
        size = path.stat().st_size
        if size != entry["size"]:
            return [f"{name} has {size} bytes, not {entry['size']}"]
        return [] if _entry(path)["sha256"] == entry["sha256"] else [f"{name} is not what was written"]
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror})"]
