"""TODO head of export.shards."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from qlora.errors import UserError, problem
from qlora.models.packed import STORED

CPU = torch.device("cpu")
NAMES = {dtype: name for name, dtype in STORED.items()}


class ShardWriter:
    """Safetensors files of about `shard_size` bytes and their index, in Hugging Face's naming.

    A tensor goes to the disk as it comes, behind room for the header, which is written when the shard is full. The
    format has no gaps and its readers want aligned tensors, so one whose size is no multiple of 8 bytes waits for the
    end of its shard.
    """

    HEADER = 2**20 - 8  # bytes for some 5000 tensors; what is not used is spaces, as the format allows

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.total_bytes = 0
        self.shards: list[list[str]] = []
        self._begin()

    def _begin(self) -> None:
        self.entries: dict[str, dict] = {}
        self.waiting: dict[str, Tensor] = {}
        self.size = self.end = self.header = 0  # bytes taken, bytes on the disk, and of the header at most
        self.path = self.folder / f"shard-{len(self.shards)}"

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; end the shard before it if there is no room for both."""
        tensor = tensor.detach().contiguous()
        size = tensor.numel() * tensor.element_size()
        entry = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.shard_size, self.shard_size + size],
        }
        header = len(json.dumps({name: entry}))
        if self.entries and (self.size + size > self.shard_size or self.header + header > self.HEADER - 100):
            self._flush()
        self.entries[name] = entry
        self.size, self.total_bytes, self.header = self.size + size, self.total_bytes + size, self.header + header
        if size % 8:
            self.waiting[name] = tensor
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(8 + self.HEADER + self.end)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        start, self.end = self.end, self.end + tensor.numel() * tensor.element_size()
        self.entries[name]["data_offsets"] = [start, self.end]

    def _flush(self) -> None:
        for name, tensor in sorted(self.waiting.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        text = (
            json.dumps({"__metadata__": {"format": "pt"}} | self.entries, separators=(",", ":"))
            .encode()
            .ljust(self.HEADER)
        )
        with self.path.open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        self.shards.append(list(self.entries))
        self._begin()

    def close(self) -> None:
        """End the last shard, give the files their names and write the index if there are several."""
        if self.entries:
            self._flush()
        count = len(self.shards)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            where = {key: name for keys, name in zip(self.shards, names, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def placeholder(value: Tensor) -> Tensor:
    """Stands in the model for a tensor that went to a shard: the right shape, no memory of its own. A few bytes for
    each, allocated
    after the weight and staying when it goes, kept glibc from using its place again: merging a 1B model took 1.6 GB in
    place of 0.3.
    """
    return _one(value.dtype).expand(value.shape) if value.dim() else value


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, dtype=dtype)


def check_new_folder(output: str | Path) -> Path:
    folder = Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(problem("output", output, "exists and is not an empty folder", "Choose a new folder"))
    return folder


def write_config(model, folder: Path, dtype: torch.dtype) -> None:
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
