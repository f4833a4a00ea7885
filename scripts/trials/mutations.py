"""Ways to damage what a user's file holds: bytes, a JSON value, a safetensors file, one file of a folder.

    damage_...(dice, whole) -> damaged           the same dice, the same damage

Cut, flipped, doubled, of another type, gone, nested, or telling a size that is not so. `fuzz.py` reads the results.
The alternative, a list of damaged files by hand, holds what its author thought of.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

WRONG: list[Any] = [None, True, False, -1, 0, 1, 2**31, 10**30, 0.5, -1e300, "", "x", "\x00", "\n", "nan", "é" * 300]
WRONG += [[], {}, [None], [[1]], {"a": {}}, ["a", "b"], {"": 0}, "../../x", "/etc/passwd", "a/b", 64, 65, "10" * 40]


def damage_bytes(dice: random.Random, data: bytes) -> bytes:
    """`data` with one to three of: its end cut off, a bit flipped, a part gone, doubled or noise, a lying size."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        at = dice.randrange(len(data) + 1)
        if dice.random() < 0.3:
            at = min(at, dice.randrange(200))  # headers lie in front
        end = min(len(data), at + dice.choice((1, 4, 8, 30)))
        kind = dice.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:end] + data[at:]
        elif kind == 4:
            data = data[:at] + dice.randbytes(end - at) + data[end:]
        else:
            size = struct.pack("<Q", dice.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
            data = data[:at] + size + data[at + 8 :]
    return data


def damage_value(dice: random.Random, value: Any) -> Any:
    """A JSON value with something in it of another type, gone, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 2))):
        inner = value
        while isinstance(inner, (dict, list)) and inner:
            key = dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[key], (dict, list)) and inner[key] and dice.random() < 0.7:
                inner = inner[key]
                continue
            kind = dice.random()
            if kind < 0.65:
                inner[key] = copy.deepcopy(dice.choice(WRONG))
            elif kind < 0.8:
                del inner[key]
            elif isinstance(inner, dict):
                inner[dice.choice(["x", "", "é", f"{key}s"])] = inner.pop(key)
            else:
                inner.append(copy.deepcopy(dice.choice(WRONG)))
            break
    return value


def damage_json(dice: random.Random, text: bytes) -> bytes:
    """A JSON file, damaged as a value, as bytes, or replaced."""
    kind = dice.random()
    if kind < 0.75:
        return json.dumps(damage_value(dice, json.loads(text))).encode()
    if kind < 0.93:
        return damage_bytes(dice, text)
    return dice.choice((b"", b"3", b"[]", b"null", b'"x"', b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"NaN"))


def damage_safetensors(dice: random.Random, data: bytes) -> bytes:
    """Its header damaged as JSON, with the right size or a lying one; or its bytes; or values that are no numbers."""
    size = int.from_bytes(data[:8], "little")
    kind = dice.random()
    if kind < 0.5:
        header = damage_json(dice, data[8 : 8 + size])
        told = len(header) if dice.random() < 0.8 else dice.choice((0, len(header) + 1, 2**40, 2**64 - 1))
        return told.to_bytes(8, "little") + header + data[8 + size :]
    if kind < 0.8:
        return damage_bytes(dice, data)
    at = 8 + size + 4 * dice.randrange(max(1, (len(data) - 8 - size) // 4))
    return data[:at] + struct.pack("<f", dice.choice((float("nan"), float("inf"), 3e38))) + data[at + 4 :]


DAMAGE = {".json": damage_json, ".safetensors": damage_safetensors}


def damage_folder(dice: random.Random, whole: Path, folder: Path, names: list[str] | None = None) -> str:
    """A copy of `whole` at `folder` with one file damaged, sometimes gone or another's; returns what was done."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    if dice.random() < 0.5:  # it tells any change at once; without it what reads the files must
        (folder / "manifest.json").unlink(missing_ok=True)
    files = sorted(path for path in folder.iterdir() if path.is_file() and (names is None or path.name in names))
    path = dice.choice(files)
    if dice.random() < 0.03:
        path.unlink()
        return f"{path.name} removed"
    if dice.random() < 0.03:
        other = dice.choice(sorted(folder.iterdir()))
        path.write_bytes(other.read_bytes())
        return f"{path.name} is {other.name}"
    path.write_bytes(DAMAGE.get(path.suffix, damage_bytes)(dice, path.read_bytes()))
    return f"{path.name}, {path.stat().st_size} bytes"
