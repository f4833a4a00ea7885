"""Writing a model's folder tensor by tensor: safetensors shards, their index, config and tokenizer.

    write_model(source, folder, transform)    every tensor of `source` goes through `transform` into a ShardWriter

The alternative, `save_pretrained`, wants the whole state dict at once.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora.errors import UserError, guard, problem
from qlora.files import whole_folder
from qlora.models.device import DTYPES
from qlora.models.load import load_streaming
from qlora.models.packed import STORED
from qlora.models.quantize import is_finite
from qlora.models.source import Source

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
        """Start a shard."""
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
        """Put a tensor's bytes behind those on the disk."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(8 + self.HEADER + self.end)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        start, self.end = self.end, self.end + tensor.numel() * tensor.element_size()
        self.entries[name]["data_offsets"] = [start, self.end]

    def _flush(self) -> None:
        """Write the tensors that wait, largest elements first, then the header."""
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


@dataclass(frozen=True)
class Written:
    """What `write_model` writes: `dtype` is stated in the config; tensors are read as `read_as` ("auto": that of the
    config), those that `as_stored` names in the type of the checkpoint.

    `stops` are tokens that end an answer, beside those that the model's own generation_config names.
    """

    dtype: torch.dtype
    read_as: torch.dtype | str
    shard_size: int  # bytes
    stops: tuple[int, ...] = ()
    as_stored: Callable[[str], bool] = lambda name: False


def write_model(
    source: Source,
    folder: Path,
    transform: Callable[[str, Any], dict[str, Tensor]],
    form: Written,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepare: Callable[[nn.Module], None],
    finish: Callable[[PreTrainedModel], None],
) -> Path:
    """`write_into` a folder that appears whole at the end, or not at all; returns it.

    Raises:
        UserError: see `write_into`; the disk is full; something else appeared in the folder's place, and the result is
            beside it.
    """
    with whole_folder(folder, replaces=False) as part:
        write_into(part, source, transform, form, tokenizer, prepare=prepare, finish=finish)
    return folder


def write_into(
    folder: Path,
    source: Source,
    transform: Callable[[str, Any], dict[str, Tensor]],
    form: Written,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepare: Callable[[nn.Module], None],
    finish: Callable[[PreTrainedModel], None],
) -> None:
    """Pass every tensor of a model through `transform` and write what it returns, by name, into a folder.

    Args:
        folder: is there, and empty.
        source: the model to read.
        transform: takes a parameter's name and tensor, returns the tensors to write in its place.
        form: dtypes, file size, tokens that end an answer.
        tokenizer: is saved with the model.
        prepare: sees the empty model first.
        finish: sees it when all has passed, may raise, and may change its config before that is written.

    Raises:
        UserError: what `load_streaming`, `transform` or `finish` found wrong.
    """
    writer = ShardWriter(folder, form.shard_size)

    def on_tensor(parameter: str, value: Any) -> dict[str, Tensor]:
        written = transform(parameter, value)
        for name, tensor in written.items():
            writer.add(name, tensor)
        return {parameter: placeholder(value if isinstance(value, Tensor) else written[parameter])}

    model = load_streaming(source, on_tensor, dtype=form.read_as, device=CPU, prepare=prepare, as_stored=form.as_stored)
    finish(model)
    writer.close()
    _write_config(model, folder, form)
    tokenizer.save_pretrained(folder)


def in_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, still finite.

    Raises:
        UserError: it is beyond the range of the dtype, or was not finite before.
    """
    result = value.to(dtype)
    if is_finite(result):
        return result
    short = next(short for short, known in DTYPES.items() if known == dtype)
    if dtype == torch.float16:
        rule, remedy = f"{name} holds values beyond its range, or no finite numbers", "Use `dtype=bf16`"
    else:
        rule, remedy = f"{name} holds values that are no finite numbers", "Get the base or the adapter again"
    raise UserError(problem("dtype", short, rule, remedy))


def placeholder(value: Tensor) -> Tensor:
    """Stands in the model for a tensor that went to a shard: the right shape, no memory of its own.

    A few bytes for each, allocated after the weight and staying when it goes, would keep glibc from using the weight's
    place again (docs/log.md).
    """
    return _one(value.dtype).expand(value.shape) if value.dim() else value


@functools.cache
def _one(dtype: torch.dtype) -> Tensor:
    return torch.empty(1, dtype=dtype)


def check_new_folder(output: str | Path) -> Path:
    """The absolute path of a folder to write.

    Raises:
        UserError: it exists and is not an empty folder.
    """
    with guard("output", repr(str(output)), "cannot be looked at", "Choose another folder"):
        folder = Path(output).expanduser().absolute()
        if "\0" in str(folder):
            raise ValueError("it holds a zero byte")
        taken = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise UserError(problem("output", output, "exists and is not an empty folder", "Choose a new folder"))
    return folder


def _write_config(model: PreTrainedModel, folder: Path, form: Written) -> None:
    """config.json and generation_config.json, which ends answers where our own `generate` ends them."""
    model.config.dtype = form.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        own = generation.eos_token_id
        stops = {*form.stops, *([] if own is None else [own] if isinstance(own, int) else own)}
        if form.stops and stops:
            generation.eos_token_id = sorted(stops) if len(stops) > 1 else min(stops)
        generation.save_pretrained(folder)
