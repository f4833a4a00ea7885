"""Columns -> messages: which format a file has, and its records as conversations.

    {"question": "a", "answer": "b"}  ->  [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

A format is known by its columns (COLUMNS), so nobody has to name it. What is wrong with a record is gathered under its
own place ("line 17"), not raised at the first. The alternative, a prompt template in the options, makes every user
write what six formats already say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from qlora.data.records import Gathered, kind_of, text_of
from qlora.errors import UserError, brief, problem, shortened

_SHOWN = 20  # columns that a message names

# format -> the columns it needs. Others are not used, but for those in OPTIONAL, and are named before training.
COLUMNS = {
    "chat": ("messages",),  # [{"role": "user", "content": "..."}, ...]
    "sharegpt": ("conversations",),  # [{"from": "human", "value": "..."}, ...]
    "alpaca": ("instruction", "output"),  # and optionally `input`, below the instruction after an empty line
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}
OPTIONAL = {
    "chat": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("system", "input"),
    "prompt-completion": ("system",),
    "question-answer": ("system",),
    "text": (),
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
    names = sorted(map(str, anywhere))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = f"the columns are {', '.join(shortened(name, 60) for name in names[:_SHOWN]) or 'none'}{more}"
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
    lower = {name.strip().lower(): name for name in names}
    for meant, needed in COLUMNS.items():
        if lower.keys() >= set(needed):
            renamed = " and ".join(f"{lower[column]} to {column}" for column in needed if lower[column] != column)
            raise UserError(
                problem(
                    "data",
                    source_of(records),
                    f"{shown}, which fit {meant} but for their spelling",
                    f"Rename {renamed}",
                )
            )
    raise UserError(problem("data", source_of(records), f"{shown}, which fit no format", f"Rename them: {needs}"))


def is_empty(record: dict) -> bool:
    """Whether no column holds a value: the last rows of a spreadsheet."""
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in record.values())


def unused_columns(records: Sequence[dict], format: str) -> list[str]:
    """The columns with values that a format does not read."""
    used = {*COLUMNS[format], *OPTIONAL[format]}
    return sorted(
        {
            str(name)
            for record in records
            for name, value in record.items()
            if name not in used and value not in (None, "", [], {})
        }
    )


def source_of(records: Sequence[dict]) -> str:
    """The file that the records came from, for errors."""
    return getattr(records[0], "source", "records")


class RecordReader:
    """One record read as a format; what is wrong with it is gathered in `problems`, under the record's own name.

    Attributes:
        muted: the numbers of the messages whose `weight` is 0.
        ignored: keys of turns that the format does not know.
    """

    def __init__(self, record: dict, number: int, problems: Gathered | None = None):
        self.record = record
        self.problems = Gathered() if problems is None else problems
        self.good = True
        self.muted: set[int] = set()
        self.ignored: set[str] = set()
        self.source, self.place = getattr(record, "source", "records"), getattr(record, "place", f"record {number}")

    def wrong(self, rule: str, remedy: str) -> None:
        """Add a problem of this record."""
        self.good = False
        self.problems.add("data", self.source, f"{self.place}: {rule}", remedy)

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
            self.muted = {number + len(head) for number in self.muted}
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
        messages: list[dict] = []
        for number, turn in enumerate(turns, 1):
            role = turn.get(role_key)
            if not isinstance(role, str) or role not in roles:
                self.wrong(
                    f"turn {number} has {role_key}={shortened(repr(role), 60)}", f"Write one of {', '.join(roles)}"
                )
                continue
            if not self.weight(turn, number):
                self.muted.add(len(messages))
            if chat:  # tool calls, names, reasoning: all that is the template's business
                rest = {key: value for key, value in turn.items() if key not in ("role", "content", "weight")}
            else:
                rest = {}
                self.ignored |= {key for key, value in turn.items() if value} - {"from", "value", "weight"}
            self.check_calls(rest, number)
            content = turn.get(text_key)
            if content is not None or not rest.get("tool_calls"):
                content = self.text(text_key, turn, f"turn {number}: ")
            elif text_key not in turn:
                messages.append({"role": roles[role], **rest})
                continue
            messages.append({"role": roles[role], "content": content, **rest})
        if self.good and not any(message["role"] == "assistant" for message in messages):
            self.wrong("no assistant turn, so there is nothing to learn", "Leave the record out")
        return messages

    def weight(self, turn: dict, number: int) -> bool:
        """Whether a turn counts: its `weight` is 1 or missing, and not 0."""
        value = turn.get("weight")
        if value is None or str(value) in ("1", "1.0", "True"):
            return True
        if str(value) not in ("0", "0.0", "False"):
            self.wrong(f"turn {number} has weight={shortened(value, 40)}", "Write 1, or 0 for a turn not to learn")
        return False

    def check_calls(self, turn: dict, number: int) -> None:
        """See that `tool_calls` are objects, and arguments that are text are the text of a JSON object."""
        calls = turn.get("tool_calls") or []
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if not isinstance(calls, list) or not all(isinstance(function, dict) for function in functions):
            self.wrong(f"turn {number}: `tool_calls` is not a list of objects", 'Write [{"function": {...}}, ...]')
            turn.pop("tool_calls")
            return
        for function in filter(None, functions):
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError) as error:
                    rule = f"turn {number}: the `arguments` of a tool call are text that is no JSON ({brief(error)})"
                    self.wrong(rule, "Write an object, or its JSON text")
                    continue
            if arguments is not None and not isinstance(arguments, dict):
                rule = f"turn {number}: the `arguments` of a tool call are {kind_of(arguments)}"
                self.wrong(rule, "Write an object, or its JSON text")

    def tools(self) -> list | None:
        """The column `tools`: a list of JSON schemas, or its JSON text."""
        tools = self.record.get("tools") or None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                self.wrong(f"`tools` is not JSON ({brief(error)})", "Write a list of JSON schemas")
                return None
        if tools is not None and not isinstance(tools, list):
            self.wrong(f"`tools` is {kind_of(tools)}, where a list is needed", "Write a list of JSON schemas")
        elif tools is not None and not all(isinstance(tool, dict) for tool in tools):
            self.wrong("`tools` holds what is no object", "Write a list of JSON schemas")
        return tools
