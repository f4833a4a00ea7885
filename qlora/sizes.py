"""Sizes in bytes as people write them: 200MB, 1.5GB, 2GiB, and the budgets of optimizer state made of them."""

from __future__ import annotations

import re


def parse_memory(value: object) -> int | str:
    """A budget of the optimizer's state: "auto", "all", "none", or bytes, also as "200MB". Raises: ValueError."""
    value = parse_size(value)
    if value in ("auto", "all", "none") or (type(value) in (int, float) and value >= 0 and value == int(value)):
        return value if isinstance(value, str) else int(value)
    raise ValueError("must be auto, all, none or a size such as 200MB")


def parse_size(value: object) -> object:
    """ "1GB", "500 MB", "2GiB" -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", value.lower()) if isinstance(value, str) else None
    if not match:
        return number(value)
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def number(value: object) -> object:
    """bool is no number; text such as 1e3 may be a whole one."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?[eE][+-]?\d+\s*", value):
        return float(value)
    return value
