"""The native library of another machine, run by an emulator: `Library` stands where `ctypes.CDLL` does, so that the
tests of the kernels run as they are on tensors of this machine.

    QLORA_TEST_MACHINE=aarch64 python -m pytest tests/kernels/test_nf4.py

A call sends the memory that its pointers lie in through a pipe (emulated.cpp), and takes it back. Which memory that is
says `Tensor.data_ptr`, which is listened to. The alternative, a torch for that machine under the emulator, takes a
minute to import.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from qlora_kernels.cpu import build

MACHINE = "aarch64"
COMPILER, EMULATOR, ROOT = f"{MACHINE}-linux-gnu-g++", f"qemu-{MACHINE}", f"/usr/{MACHINE}-linux-gnu"
CHOSEN = os.environ.get("QLORA_TEST_MACHINE") == MACHINE  # whether this run's kernels are those of the machine
# These are about this process's memory, which lies elsewhere there.
ADVICE = frozenset({"qlora_huge_pages", "qlora_new_tensor", "qlora_release_memory"})
KEPT = 512  # more than the tensors of any call, and their memory is small


def missing() -> list[str]:
    """The tools that this machine lacks for it."""
    return [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]


class Library:
    """The library, compiled into `folder` and loaded behind the emulator."""

    def __init__(self, folder: Path):
        built = build.FOLDER / f"_native.{MACHINE}.so"
        if not build.is_fresh(built, MACHINE):
            build.compile_library(built, COMPILER, MACHINE)
        server = folder / "server"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([COMPILER, "-O1", str(source), "-ldl", "-o", str(server)], check=True)
        self._process = subprocess.Popen(
            [EMULATOR, "-L", ROOT, str(server), str(built)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._memory: dict[int, torch.UntypedStorage] = {}  # by address: what pointers were asked of last, kept alive
        address_of = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self._memory.pop(storage.data_ptr(), None)
            self._memory[storage.data_ptr()] = storage
            if len(self._memory) > KEPT:
                del self._memory[next(iter(self._memory))]
            return address_of(tensor)

        torch.Tensor.data_ptr = data_ptr

    def close(self) -> None:
        del torch.Tensor.data_ptr  # the one it inherits appears again
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._process.stdout.close()

    def __getattr__(self, name: str) -> _Function:
        function = _Function(self, name)
        setattr(self, name, function)
        return function


class _Function:
    """One function of the library; `argtypes` and `restype` as in ctypes."""

    argtypes: list[type]
    restype: type | None = None

    def __init__(self, library: Library, name: str):
        self._library, self._name = library, name

    def __call__(self, *arguments):
        if self._name in ADVICE:
            return None
        assert len(arguments) == len(self.argtypes), self._name
        words, floats, pointers = [], [], []
        segments: dict[int, tuple[int, int]] = {}  # address -> bytes, whether it holds pointers
        for value, kind in zip(arguments, self.argtypes, strict=True):
            if kind is ctypes.c_float:
                floats.append(value)
            elif isinstance(value, (ctypes.Structure, ctypes.Array)):
                words.append(ctypes.addressof(value))
                segments[words[-1]] = ctypes.sizeof(value), 1
                content = bytes(value)
                pointers += struct.unpack_from(f"{len(content) // 8}Q", content)
            else:
                words.append(int(value or 0))
                pointers += words[-1:] if kind is ctypes.c_void_p else []
        for address, storage in self._library._memory.items():
            if any(address <= pointer < address + storage.nbytes() for pointer in pointers):
                segments[address] = storage.nbytes(), 0
        is_text = self.restype is ctypes.c_char_p
        name = self._name.encode()
        to, back = self._library._process.stdin, self._library._process.stdout
        to.write(struct.pack("q", len(name)) + name)
        to.write(struct.pack("4q", is_text, len(segments), len(words), len(floats)))
        for address, (size, holds_pointers) in segments.items():
            to.write(struct.pack("3Q", address, size, holds_pointers))
            to.write((ctypes.c_char * size).from_address(address))
        to.write(struct.pack(f"{len(words)}q", *words) + struct.pack(f"{len(floats)}f", *floats))
        to.flush()
        (result,) = struct.unpack("q", back.read(8))
        if is_text:
            result = back.read(result) if result else None
        for address, (size, holds_pointers) in segments.items():
            if not holds_pointers:
                back.readinto((ctypes.c_char * size).from_address(address))
        if self.restype is ctypes.c_int:
            result = ctypes.c_int(result).value
        return result if self.restype else None
