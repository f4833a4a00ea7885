"""Columns -> messages: which format a file has, and its records as conversations.

    {"question": "a", "answer": "b"}  ->  [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

A format is known by its columns (COLUMNS), so nobody has to name it. What is wrong with a record is gathered under its
own place ("line 17"), not raised at the first. The alternative, a prompt template in the options, makes every user
write what six formats already say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qlora.data.records import kind_of, text_of
from qlora.errors import UserError, problem

# format -> the columns it needs. Others are ignored, but for `system` (not in text) and `tools` (chat and sharegpt).
COLUMNS = {
    "chat": ("messages",),  # [{"role": "user", "content": "..."}, ...]
    "sharegpt": ("conversations",),  # [{"from": "human", "value": "..."}, ...]
    "alpaca": ("instruction", "output"),  # and optionally `input`, below the instruction after an empty line
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def pick_format(records: Sequence[dict], format: str | None = None) -> str:
    """The name in COLUMNS that the columns fit; `format` decides if it is given and its columns are there.

    Decided by the columns all records share, or if none fits, by those that any has (the records without them are named
    later). Two formats that fit (`question`, `answer` and also `text`) are an error that names both, never a guess.

    Raises:
        UserError: no format fits, or several do.
    """
    everywhere, anywhere = set(records[0]).intersection(*records), set().union(*records)
    shown = f"the columns are {', '.join(sorted(map(str, anywhere))) or 'none'}"
    if format is not None:
        if format not in COLUMNS:
            raise UserError(problem("format", format, f"must be one of {', '.join(COLUMNS)}", "Choose one of them"))
        if not anywhere.issuperset(COLUMNS[format]):
            rule = f"needs the columns {' and '.join(COLUMNS[format])}, and {shown}"
            raise UserError(problem("format", format, rule, "Rename the columns, or choose another format"))
        return format
    for columns in (everywhere, anywhere):
        fitting = [name for name, needed in COLUMNS.items() if columns.issuperset(needed)]
        if len(fitting) > 1:
            rule = f"{shown}, which fit {' and '.join(fitting)}"
            remedy = f"Say which, for example `format={fitting[0]}`"
            raise UserError(problem("data", source_of(records), rule, remedy))
        if fitting:
            return fitting[0]
    needs = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in COLUMNS.items())
    raise UserError(problem("data", source_of(records), f"{shown}, which fit no format", f"Rename them: {needs}"))


def source_of(records: Sequence[dict]) -> str:
    """The file that the records came from, for errors."""
    return getattr(records[0], "source", "records")


class RecordReader:
    """One record read as a format; what is wrong with it gathers in `problems`, under the record's own name."""

    def __init__(self, record: dict, number: int):
        self.record = record
        self.problems: list[str] = []
        self.source, self.place = getattr(record, "source", "records"), getattr(record, "place", f"record {number}")

    def wrong(self, rule: str, remedy: str) -> None:
        """Add a problem of this record."""
        self.problems.append(problem("data", self.source, f"{self.place}: {rule}", remedy))

    def text(self, column: str, values: dict | None = None, of: str = "", required: bool = True) -> str:
        """The text of a column, of the record or of the `values` of a turn (`of`: its name); "" with a problem."""
        values = self.record if values is None else values
        value = values.get(column)
        text = text_of(value)
        if text is None and (required or value is not None):
            found = f"is {kind_of(value)}" if column in values else "is missing"
            self.wrong(f"{of}`{column}` {found}, where text is needed", "Write text, or leave the record out")
        elif text and not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            self.wrong(f"{of}`{column}` holds half a surrogate pair", "Repair its \\u escapes")
        return text or ""

    def messages(self, format: str) -> list[dict]:
        """The record as a conversation, as far as it has no problems."""
        system = self.text("system", required=False)
        head = [{"role": "system", "content": system}] if system else []
        if format in ("chat", "sharegpt"):
            turns = self.turns(format)
            if head and turns and turns[0]["role"] == "system":
                self.wrong("there is a system turn, and a column `system` too", "Leave one of them out")
            return head + turns
        asked, answered = COLUMNS[format]
        prompt, answer = self.text(asked), self.text(answered)
        if format == "alpaca" and (context := self.text("input", required=False)):
            prompt = f"{prompt}\n\n{context}"
        return [*head, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def turns(self, format: str) -> list[dict]:
        """The turns of a chat or ShareGPT record, under the names of a chat."""
        column = COLUMNS[format][0]
        chat = format == "chat"
        role_key, text_key, roles = ("role", "content", ROLES) if chat else ("from", "value", SHAREGPT_ROLES)
        turns = self.record.get(column)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            found = "an empty or mixed list" if isinstance(turns, list) else kind_of(turns)
            found = found if column in self.record else "missing"
            self.wrong(
                f"`{column}` is {found}, where a list of turns is needed",
                f'Write [{{"{role_key}": "user", "{text_key}": "..."}}, ...]',
            )
            return []
        messages = []
        for number, turn in enumerate(turns, 1):
            role = turn.get(role_key)
            if not isinstance(role, str) or role not in roles:
                self.wrong(f"turn {number} has {role_key}={role!r}", f"Write one of {', '.join(roles)}")
            elif chat and turn.get(text_key) is None and turn.get("tool_calls"):
                messages.append(turn)  # tool calls, names, reasoning: all that is the template's business
            else:
                text = self.text(text_key, turn, f"turn {number}: ")
                messages.append({**(turn if chat else {}), "role": roles[role], "content": text})
        if not self.problems and not any(message["role"] == "assistant" for message in messages):
            self.wrong("no assistant turn, so there is nothing to learn", "Leave the record out")
        return messages

    def tools(self) -> list | None:
        """The column `tools`: a list of JSON schemas, or its JSON text."""
        tools = self.record.get("tools") or None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                self.wrong(f"`tools` is not JSON ({error})", "Write a list of JSON schemas")
                return None
        if tools is not None and not isinstance(tools, list):
            self.wrong(f"`tools` is {kind_of(tools)}, where a list is needed", "Write a list of JSON schemas")
        return tools
