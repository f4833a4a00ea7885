"""What a user did wrong, said once and completely.

Every check gathers its problems and raises one `UserError`; the command line prints the lines and exits with 2. A
message names an option as a Python caller gives it, in backticks: `batch_size` or `bits=4`; the command line spells
these as flags when it prints (`cli.as_flags`). The alternative, raising at the first problem, makes a user repair a run
file one error at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Input we cannot work with. `problems` holds one line per problem, each `name=value: rule. What to do.`"""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def problem(name: str, value: object, rule: str, remedy: str) -> str:
    """One line in the form every error of ours has: `name=value: rule. What to do.`"""
    end = "" if remedy.endswith("?") else "."
    return f"{name}={value}: {rule.rstrip('.')}. {remedy.rstrip('.')}{end}"


@contextmanager
def guard(name: str, value: object, rule: str, remedy: str) -> Iterator[None]:
    """A boundary: whatever foreign code raises inside becomes one line about `name=value`, with what the error says.

    For reading what a user gave: a file, a config, a template. Errors of ours pass as they are. No list of exception
    types: safetensors, tokenizers, pyarrow and jinja2 each have their own, and a damaged file finds the one that a list
    forgot. A panic of a Rust library is no `Exception`, and is meant too.

    Raises:
        UserError: something inside raised.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(problem(name, shortened(value), f"{rule} ({brief(error)})", remedy)) from error
        raise


def brief(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    said = " ".join(str(error).split())
    return shortened(said or type(error).__name__, 200)


def shortened(value: object, most: int = 300) -> str:
    """The text of a value, its middle left out where it is long: a message is one line of a terminal."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 60]} ... {text[-50:]}"
