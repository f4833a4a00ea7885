"""Records -> conversations -> tokens and loss mask -> batches; everything seeded, nothing remembered.

    tokenize       records -> Dataset of Example(ids, targets); targets[i]: token i is predicted and counts in the loss
    collate        examples -> Batch, padded on the right; attention and loss are masked by LENGTH, never by token id
    step_indices   which examples optimizer step k sees: a pure function of (count, per_step, seed, k)

Every format is one thing inside, a list of messages (`qlora.chat` renders it), or plain text. A whole conversation is
tokenized once, so its ids equal `apply_chat_template(messages, tokenize=True)`, and the mask is laid over it by the
character offsets of the tokenizer. Not taken: tokenizing prompt and answer apart, whose tokens at the seam differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from qlora.chat import (
    REFUSALS,
    Rendered,
    no_template,
    prompt_ids,
    render_chat,
    render_plain,
    render_prompt,
    special_tokens,
    stop_ids,
    without_bos,
)
from qlora.config import FinetuneConfig
from qlora.errors import UserError, problem
from qlora.records import kind_of, raise_all, read_records, text_of

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "by_length",
    "collate",
    "epoch_order",
    "pick_format",
    "prompt_ids",
    "read_records",
    "render_prompt",
    "run_length",
    "split",
    "step_count",
    "step_indices",
    "stop_ids",
    "stream_length",
    "tokenize",
]

IGNORE = -100  # the label that transformers and cross_entropy leave out of the loss

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
_CHUNK = 1000  # texts given to the tokenizer's threads at once


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    targets: tuple[bool, ...]  # targets[i]: token i is predicted from those before it; targets[0] is never set


@dataclass
class Dataset:
    examples: list[Example]
    format: str
    truncated: int  # examples cut at max_tokens and kept
    dropped: int  # examples left out: no target token in them, or too long with truncate="drop"
    tokens: int
    target_tokens: int
    skipped_turns: int = 0  # assistant turns not trained on, because the template writes them differently later


# ------------------------------------------------------------------------------------------- records -> conversations
def pick_format(records: Sequence[dict], format: str | None = None) -> str:
    """The name in COLUMNS that the columns fit; `format` decides if it is given and its columns are there.

    Told by the columns all records share, or if none fits, by those that any has (the records without them are named
    later). Two formats that fit (`question`, `answer` and also `text`) are an error that names both, never a guess.

    Raises UserError: no format fits, or several do.
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
            raise UserError(
                problem(
                    "data",
                    _source(records),
                    f"{shown}, which fit {' and '.join(fitting)}",
                    f"Say which, for example --format {fitting[0]}",
                )
            )
        if fitting:
            return fitting[0]
    needs = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in COLUMNS.items())
    raise UserError(problem("data", _source(records), f"{shown}, which fit no format", f"Rename them: {needs}"))


def _source(records: Sequence[dict]) -> str:
    return getattr(records[0], "source", "records")


class _Checked:
    """One record read as a format; what is wrong with it gathers in `problems`, under the record's own name."""

    def __init__(self, record: dict, number: int):
        self.record, self.problems = record, []
        self.source, self.place = getattr(record, "source", "records"), getattr(record, "place", f"record {number}")

    def wrong(self, rule: str, remedy: str) -> None:
        self.problems.append(problem("data", self.source, f"{self.place}: {rule}", remedy))

    def text(self, column: str, values: dict | None = None, of: str = "", required: bool = True) -> str:
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


def _render(records: Sequence[dict], format: str, tokenizer, *, need_spans: bool) -> list[Rendered]:
    """Every record as text with its target spans.  Raises UserError with the problems of all records."""
    rendered, problems = [], []
    endings = tuple(special_tokens(tokenizer))
    for number, record in enumerate(records, 1):
        checked = _Checked(record, number)
        if format == "text":
            found = Rendered(without_bos(checked.text("text"), tokenizer), eos=True)
        else:
            messages = checked.messages(format)
            tools = checked.tools() if format in ("chat", "sharegpt") else None
            if checked.problems:
                found = None
            elif not tokenizer.chat_template:
                found = render_plain(messages)
            else:
                try:
                    found = render_chat(messages, tokenizer, tools, endings)
                except REFUSALS as error:
                    found = None
                    checked.wrong(f"the chat template refuses it ({error})", "Change its turns, or leave it out")
                if found and need_spans and not found.spans:
                    checked.wrong(
                        "the chat template does not write the answer behind its own generation prompt, so "
                        "the answer's tokens are unknown",
                        "Use --train-on-prompt, or another model",
                    )
        rendered.append(found)
        problems += checked.problems
    raise_all(problems)
    if tokenizer.eos_token_id is None and any(item.eos for item in rendered):
        raise UserError("model: its tokenizer has no EOS token, so no answer would end. Take another model.")
    return rendered


# --------------------------------------------------------------------------------------------- text -> tokens and mask
def tokenize(
    records: Sequence[dict],
    tokenizer,
    *,
    format: str | None = None,
    max_tokens: int = 1024,
    train_on_prompt: bool = False,
    truncate: str = "end",
) -> Dataset:
    """Records -> tokens and loss mask.

    Targets are the tokens of every assistant turn with its end-of-turn token; for `text`, and with `train_on_prompt`,
    every token but the first. The ids of a chat equal `tokenizer.apply_chat_template(messages)`, except that EOS
    follows where a template closes its last answer with no special token. An example longer than `max_tokens` loses its
    tail (truncate="end") or is dropped ("drop"); one that keeps no target is dropped.

    Raises UserError with every record that does not fit (the first ten), and if no example is left.
    """
    if not records:
        raise UserError("data: there are no records. Give at least one.")
    format = pick_format(records, format)
    if format in ("chat", "sharegpt") and not tokenizer.chat_template:
        raise UserError(no_template("data", _source(records)))
    everything = train_on_prompt or format == "text"
    rendered = _render(records, format, tokenizer, need_spans=not everything)
    templated = format != "text" and bool(tokenizer.chat_template)  # and then BOS and EOS are the template's business

    dataset = Dataset([], format, 0, 0, 0, 0, sum(item.skipped for item in rendered))
    special, eos, shared, longest = set(tokenizer.all_special_ids), tokenizer.eos_token_id, {}, 0
    encoded = _encode(rendered, tokenizer, add_special_tokens=not templated, offsets=not everything)
    for number, (item, (ids, offsets)) in enumerate(zip(rendered, encoded), 1):
        while item.eos and ids and ids[-1] == eos:  # the tokenizer's or the text's own; one comes back below
            ids, offsets = ids[:-1], offsets and offsets[:-1]
        if everything:
            targets = [True] * len(ids)
        elif tokenizer.is_fast:
            targets = mask_by_offsets(ids, item.spans, offsets, special)
        else:
            targets = mask_by_prefixes(ids, item, tokenizer, add_special_tokens=not templated, record=number)
        if item.eos:
            ids, targets = [*ids, eos], [*targets, True]
        targets[:1] = [False]
        longest = max(longest, len(ids))
        too_long = len(ids) > max_tokens
        targets = targets[:max_tokens]
        if not any(targets) or (too_long and truncate == "drop"):
            dataset.dropped += 1
            continue
        # Equal ids share one int object: 16 bytes a token instead of 44.
        dataset.examples.append(Example(tuple(map(shared.setdefault, ids[:max_tokens], ids)), tuple(targets)))
        dataset.truncated += too_long
        dataset.tokens += len(targets)
        dataset.target_tokens += sum(targets)
    if not dataset.examples:
        rule = f"no example of {_source(records)} keeps a token to learn (the longest has {longest} tokens)"
        raise UserError(problem("max_tokens", max_tokens, rule, f"Raise it to {max(longest, 2)}, or check the data"))
    return dataset


def _encode(rendered: list[Rendered], tokenizer, *, add_special_tokens: bool, offsets: bool) -> Iterator[tuple]:
    """(ids, offsets or None) of each text, many texts at a time."""
    offsets = offsets and tokenizer.is_fast
    for start in range(0, len(rendered), _CHUNK):
        texts = [item.text for item in rendered[start : start + _CHUNK]]
        found = tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        yield from zip(found["input_ids"], found["offset_mapping"] if offsets else [None] * len(texts))


def mask_by_offsets(ids: Sequence[int], spans, offsets: Sequence[tuple[int, int]], special: set[int]) -> list[bool]:
    """Set for every token that holds a character of a span [start, end).

    Token ranges, found by bisection, and not character by character: tokenizers that trim their offsets (Llama 3) give
    white space none. A special token that begins before the span is left out: some swallow the white space behind them.
    """
    starts = list(accumulate((start for start, _ in offsets), max))
    ends = list(accumulate((end for _, end in offsets), max))
    targets = [False] * len(ids)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first < last and starts[first] < start and ids[first] in special:
            first += 1
        targets[first:last] = [True] * (last - first)
    return targets


def mask_by_prefixes(
    ids: Sequence[int], item: Rendered, tokenizer, *, add_special_tokens: bool, record: int
) -> list[bool]:
    """The mask with a tokenizer written in Python, which knows no offsets: by the token counts of the text's prefixes.

    Raises UserError where a prefix's tokens are not a prefix of the tokens, so that the count would be wrong.
    """
    targets = [False] * len(ids)
    for span in item.spans:
        cuts = []
        for end in span:
            prefix = list(tokenizer(item.text[:end], add_special_tokens=add_special_tokens).input_ids)
            if add_special_tokens and prefix and prefix[-1] == tokenizer.eos_token_id:
                prefix.pop()
            if list(ids[: len(prefix)]) != prefix:
                raise UserError(
                    f"model: its Python tokenizer joins prompt and answer of record {record} in one token, "
                    "and gives no offsets. Take a model with a tokenizer.json, or use --train-on-prompt."
                )
            cuts.append(len(prefix))
        targets[cuts[0] : cuts[1]] = [True] * (cuts[1] - cuts[0])
    return targets


# ------------------------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    input_ids: torch.Tensor  # [b, t] int64
    attention_mask: torch.Tensor  # [b, t] int64, 1 within the length
    labels: torch.Tensor  # [b, t] int64, the id itself (not shifted) where it is a target, -100 elsewhere
    target_tokens: int
    tokens: int  # without padding

    def to(self, device: torch.device | str) -> Batch:
        moved = (tensor.to(device) for tensor in (self.input_ids, self.attention_mask, self.labels))
        return Batch(*moved, self.target_tokens, self.tokens)


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad on the right to the longest example; `pad_id` may be any token, as length alone says what is padding."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        length, ids = len(example.ids), torch.tensor(example.ids, dtype=torch.int64)
        input_ids[row, :length] = ids
        attention_mask[row, :length] = 1
        labels[row, :length] = ids.masked_fill(~torch.tensor(example.targets, dtype=torch.bool), IGNORE)
    return Batch(input_ids, attention_mask, labels, int((labels != IGNORE).sum()), int(attention_mask.sum()))


def by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Cut into batches in which examples of like length are together, which pads less."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _permutation(count: int, *key: object) -> list[int]:
    """A permutation of range(count) from a generator of its own, seeded by a hash: (0, 1) and (1, 0) differ."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "little")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(_permutation(count, "epoch", seed, epoch))


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in one epoch, another for each epoch and seed; no global generator is touched."""
    return list(_order(count, seed, epoch))


def stream_length(count: int, epochs: float) -> int:
    """How many examples a run of `epochs` passes sees: half of them for 0.5, and at least one."""
    return max(1, round(count * epochs))


def step_count(count: int, per_step: int, epochs: float) -> int:
    """How many steps of `per_step` examples these passes take; the last may be short."""
    return math.ceil(stream_length(count, epochs) / per_step)


def run_length(config: FinetuneConfig, count: int) -> dict[str, int]:
    """How many steps a run on `count` examples takes, and how many examples it sees: epochs end with a short step."""
    per_step = config.batch_size * config.accumulate
    if config.steps is not None:
        return {"steps": config.steps, "examples": config.steps * per_step}
    steps = step_count(count, per_step, config.epochs)
    if config.warmup > steps:
        rule = f"epochs={config.epochs:g} are only {steps} steps"
        raise UserError(problem("warmup", config.warmup, rule, "Give a shorter warmup or more epochs"))
    return {"steps": steps, "examples": stream_length(count, config.epochs)}


def step_indices(count: int, per_step: int, seed: int, step: int, limit: int | None = None) -> list[int]:
    """Which examples optimizer step `step` (from 0) sees. A pure function: a resumed run needs only the step.

    The steps cut up one endless stream of epochs, each in its `epoch_order`: a step may cross epochs, none is left out.
    `limit` ends the stream: with `stream_length(count, epochs)` the last step of a run by epochs sees what is left.

    Raises ValueError for a step that begins at or past `limit`.
    """
    start = step * per_step
    end = start + per_step if limit is None else min(start + per_step, limit)
    if end <= start:
        raise ValueError(f"step {step} of {per_step} examples would begin at {start}, past the limit of {limit}")
    return [_order(count, seed, position // count)[position % count] for position in range(start, end)]


def split(records: Sequence, fraction: float, seed: int) -> tuple[list, list]:
    """(train, held out): a seeded choice of round(fraction * n) but at least 1; both parts keep their order.

    Raises UserError if nothing is left to train on.
    """
    if fraction == 0:
        return list(records), []
    held = max(1, round(fraction * len(records)))
    if held >= len(records):
        raise UserError(
            problem(
                "eval_fraction",
                fraction,
                f"holds out {held} of {len(records)} records, leaving none",
                "Lower it, or give more data",
            )
        )
    chosen = set(_permutation(len(records), "split", seed)[:held])
    parts = ([], [])
    for number, record in enumerate(records):
        parts[number in chosen].append(record)
    return parts
