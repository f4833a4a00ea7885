"""What a user did wrong, said once and completely.

Every check gathers its problems and raises one `UserError`; the command line prints the lines and exits with 2. A
message names an option as a Python caller gives it, in backticks: `batch_size` or `bits=4`; the command line spells
these as flags when it prints (`cli.as_flags`). The alternative, raising at the first problem, makes a user repair a run
file one error at a time.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_kernels import BackendError


class UserError(ValueError):
    """Input we cannot work with. `problems` holds one line per problem, each `name=value: rule. What to do.`"""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def problem(name: str, value: object, rule: str, remedy: str) -> str:
    """One line in the form every error of ours has: `name=value: rule. What to do.`"""
    end = "" if remedy.endswith("?") else "."
    return _printable(f"{shortened(name)}={shortened(value)}: {rule.rstrip('.')}. {remedy.rstrip('.')}{end}")


@contextmanager
def guard(name: str, value: object, rule: str, remedy: str) -> Iterator[None]:
    """A boundary: whatever foreign code raises inside becomes one line about `name=value`, with what the error says.

    For reading what a user gave: a file, a config, a template. Errors of ours pass as they are. No list of exception
    types: safetensors, tokenizers, pyarrow and jinja2 each have their own, and a damaged file finds the one that a list
    forgot. A panic of a Rust library is no `Exception`, and is meant too; Ctrl-C is not.

    Raises:
        UserError: something inside raised.
    """
    try:
        yield
    except (UserError, BackendError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(problem(name, value, f"{rule} ({brief(error)})", remedy)) from error
        raise


def brief(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; in our words, or its type, where it says nothing."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error)[:2000].split())
    if isinstance(error, KeyError):
        return f"there is no {shortened(said, 150)}"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return shortened(said.rstrip(".") or type(error).__name__, 200)


class _Bounded(reprlib.Repr):
    """repr of what is inside lists and dictionaries, which stops early: aliases let 400 bytes of YAML be gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxstring = 4, 20, 20, 20, 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


_BOUNDED = _Bounded()


def shortened(value: object, most: int = 300) -> str:
    """The text of a value on one line, its middle left out where it is long. Costs no more than what is shown."""
    if isinstance(value, (list, dict, set)) or type(value) in (tuple, int):
        value = _BOUNDED.repr(value)
    text = str(value)
    if len(text) > most:
        text = f"{text[: most - 60]} ... {text[-50:]}"
    return _printable(text)


def _printable(text: str) -> str:
    """A text on one line: what a file says may hold ends of lines and worse."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
