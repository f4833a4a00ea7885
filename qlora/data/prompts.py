"""Prompts from a file: a text file with one a line, or data, of which the last answer is left out.

    hello                                       ->  "hello"
    {"prompt": "a"}                             ->  "a"
    {"messages": [user "a", assistant "b"]}     ->  [user "a"], the messages up to the last answer

So the held-out data of a training serves as it is. The alternative, a format of its own for prompts, has to be made
from the data first.
"""

from __future__ import annotations

from pathlib import Path

from qlora.data.formats import RecordReader, pick_format
from qlora.data.records import Gathered, read_records
from qlora.errors import UserError, guard, problem

DATA = (".jsonl", ".json", ".csv", ".parquet")  # anything else is text


def read_prompts(file: str) -> list[str | list[dict]]:
    """The prompts of a file in its order; lines and records that are empty are none.

    Raises:
        UserError: it cannot be read, is no UTF-8 text, holds no prompt; every record without one.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() in DATA:
        prompts = _of_records([record for record in read_records(file) if record])
    else:
        with guard("prompts", file, "cannot be read", "Give a text file with a prompt a line, or a .jsonl file"):
            prompts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not prompts:
        raise UserError(problem("prompts", file, "holds no prompt", "Write one a line"))
    return prompts


def _of_records(records: list[dict]) -> list[str | list[dict]]:
    problems, prompts = Gathered(), list[str | list[dict]]()
    format = None if all("prompt" in record for record in records) else pick_format(records)
    for number, record in enumerate(records, 1):
        reader = RecordReader(record, number, problems)
        if format in (None, "text"):
            prompt, system = reader.text("prompt"), reader.text("system", required=False)
            led = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            prompts.append(led if system else prompt)
        else:
            messages = reader.messages(format)
            answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
            asked = messages[: answers[-1]] if answers else messages
            prompts.append(asked[0]["content"] if len(asked) == 1 and asked[0]["role"] == "user" else asked)
    problems.refuse()
    return prompts
