"""What a user did wrong, said once and completely.

Every check gathers its problems and raises one `UserError`; the command line prints the lines and exits with 2. A
message names an option as a Python caller gives it, in backticks: `batch_size` or `bits=4`; the command line spells
these as flags when it prints (`cli.as_flags`). The alternative, raising at the first problem, makes a user repair a run
file one error at a time.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input we cannot work with. `problems` holds one line per problem, each `name=value: rule. What to do.`"""

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def problem(name: str, value: object, rule: str, remedy: str) -> str:
    """One line in the form every error of ours has: `name=value: rule. What to do.`"""
    end = "" if remedy.endswith("?") else "."
    return f"{name}={value}: {rule.rstrip('.')}. {remedy.rstrip('.')}{end}"
