"""Records -> conversations -> tokens and loss mask -> batches; everything seeded, nothing remembered.

    tokenize       records -> Dataset of Example(ids, targets); targets[i]: token i is predicted and counts in the loss
    collate        examples -> Batch, padded on the right; attention and loss are masked by LENGTH, never by token id
    step_indices   which examples optimizer step k sees: a pure function of (count, per_step, seed, k)

Every format is one thing inside, a list of messages (`qlora.chat` renders it), or plain text. A whole conversation is
tokenized once, so its ids equal `apply_chat_template(messages, tokenize=True)`, and the mask is laid over it by the
character offsets of the tokenizer. Not taken: tokenizing prompt and answer apart, whose tokens at the seam differ.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from qlora.data.batch import Example
from qlora.data.chat import REFUSALS, Rendered, no_template, render_chat, render_plain, special_tokens, without_bos
from qlora.data.formats import RecordReader, pick_format, source_of
from qlora.data.records import raise_all
from qlora.errors import UserError, problem

_CHUNK = 1000  # texts given to the tokenizer's threads at once


@dataclass
class Dataset:
    examples: list[Example]
    format: str
    truncated: int  # examples cut at max_tokens and kept
    dropped: int  # examples left out: no target token in them, or too long with truncate="drop"
    tokens: int
    target_tokens: int
    skipped_turns: int = 0  # assistant turns not trained on, because the template writes them differently later


def _render(records: Sequence[dict], format: str, tokenizer, *, need_spans: bool) -> list[Rendered]:
    """Every record as text with its target spans.  Raises UserError with the problems of all records."""
    rendered, problems = [], []
    endings = tuple(special_tokens(tokenizer))
    for number, record in enumerate(records, 1):
        checked = RecordReader(record, number)
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
        raise UserError(no_template("data", source_of(records)))
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
        rule = f"no example of {source_of(records)} keeps a token to learn (the longest has {longest} tokens)"
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
