"""Sizes in bytes as people write them: 200MB, 1.5GB, 2GiB, and the budgets of optimizer state made of them."""

from __future__ import annotations

import re

LARGEST = 2**63  # bytes: what a file or an address space can have


def parse_memory(value: object) -> int | str:
    """A budget of the optimizer's state: "auto", "all", "none", or bytes, also as "200MB".

    Raises:
        ValueError: none of these.
    """
    value = parse_size(value)
    if isinstance(value, str) and value in ("auto", "all", "none"):
        return value
    if isinstance(value, (int, float)) and 0 <= value < LARGEST and value == int(value):  # `parse_size` refused a bool
        return int(value)
    raise ValueError("must be auto, all, none or a size such as 200MB")


def parse_size(value: object) -> object:
    """ "1GB", "500 MB", "2GiB" -> bytes.

    Raises:
        ValueError: true or false, or 2^63 bytes and more.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower()) if isinstance(value, str) else None
    size = number(value)
    if match:
        size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
    if isinstance(size, (int, float)) and size >= LARGEST:
        raise ValueError("must be less than 2^63 bytes")
    return int(size) if match and isinstance(size, float) else size


def number(value: object) -> object:
    """A value that may be a number: text such as 1e3 may be a whole one.

    Raises:
        ValueError: true or false.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?[eE][+-]?\d+\s*", value):
        return float(value)
    return value


def show_size(count: int) -> str:
    """Bytes as people write them, in the largest unit that leaves a whole number: 10**9 -> 1GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)
