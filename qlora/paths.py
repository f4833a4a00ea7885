"""A path that a user gave: `~` is home, and what the file system would only answer with an exception is said.

    "~/runs/x" -> "/home/ann/runs/x"        "a\\0b", 300 letters, a folder one may not enter -> one line

Asked once, where an option is checked (`config.options`) or a function is called from Python. The alternative, a guard
around each `is_file`, was forgotten in half of the places.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from qlora.errors import UserError, guard, problem


def expanded(name: str, value: str) -> str:
    """The text of the option `name` with its `~` expanded; anything else, such as a hub id, as it is.

    Raises:
        UserError: see `local_path`.
    """
    path = local_path(name, value)
    return str(path) if value.startswith("~") else value


def local_path(name: str, value: str | Path) -> Path:
    """The path of the option `name`, expanded. What is there, or whether, is the caller's question.

    Raises:
        UserError: no path can look so, or the file system will not tell what is there.
    """
    if not str(value):
        raise UserError(problem(name, "''", "must not be empty", "Give a path"))
    with guard(name, value, "cannot be looked at", "Check the path, and your rights to its folders"):
        path = Path(value).expanduser()
        try:
            there = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return path
        if stat.S_ISDIR(there.st_mode) and not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path
