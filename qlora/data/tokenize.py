"""Records -> conversations -> input_ids and loss mask.

    loss_mask[i] = token i holds a character of an answer (or of its end-of-turn token), and i > 0

Every format is one thing inside, a list of messages (`qlora.data.chat` renders it), or plain text. A whole conversation
is tokenized once, so its tokens equal `apply_chat_template(messages, tokenize=True)`, and the mask is found by the
character offsets of the tokenizer. The alternative, to tokenize prompt and answer apart, gives other tokens where they
meet.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from qlora.data.batch import Example
from qlora.data.chat import REFUSALS, Rendered, no_template, render_chat, render_plain, special_tokens, without_bos
from qlora.data.formats import RecordReader, pick_format, source_of
from qlora.data.records import place_of, raise_all
from qlora.errors import UserError, problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # texts given to the tokenizer's threads at once


@dataclass
class Dataset:
    """Tokenized examples, and what became of the others."""

    examples: list[Example]
    format: str
    truncated: int = 0  # examples cut at max_tokens and kept
    dropped: int = 0  # examples left out: no token in them counts, or too long with truncate="drop"
    tokens: int = 0
    target_tokens: int = 0
    skipped_turns: int = 0  # assistant turns not trained on, because the template writes them differently later


def tokenize(
    records: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str | None = None,
    max_tokens: int = 1024,
    train_on_prompt: bool = False,
    truncate: str = "end",
) -> Dataset:
    """Records -> input_ids and loss mask.

    The tokens of every assistant turn with its end-of-turn token count; for `text`, and with `train_on_prompt`, every
    token but the first. The tokens of a chat equal `tokenizer.apply_chat_template(messages)`, except that EOS follows
    where a template closes its last answer with no special token.

    Args:
        records: as `read_records` gives them.
        tokenizer: of the model.
        format: a name in COLUMNS, or None to see it from the columns.
        max_tokens: the longest example.
        train_on_prompt: learn everything, not only the answers.
        truncate: a longer example loses its tail ("end") or is dropped ("drop"); one in which no token counts any more
            is always dropped.

    Raises:
        UserError: every record that does not fit (the first ten), or no example is left.
    """
    if not records:
        raise UserError("data: there are no records. Give at least one.")
    format = pick_format(records, format)
    if format in ("chat", "sharegpt") and not tokenizer.chat_template:
        raise UserError(no_template("data", source_of(records)))
    everything = train_on_prompt or format == "text"
    rendered = _render(records, format, tokenizer, need_spans=not everything)
    templated = format != "text" and bool(tokenizer.chat_template)  # and then BOS and EOS are the template's business

    dataset, longest = Dataset([], format, skipped_turns=sum(item.skipped for item in rendered)), 0
    shared: dict[int, int] = {}  # equal tokens share one int object: 16 bytes a token instead of 44
    masked = _masked(rendered, tokenizer, everything, add_special_tokens=not templated)
    for record, (input_ids, loss_mask) in zip(records, masked, strict=True):
        longest = max(longest, len(input_ids))
        too_long = len(input_ids) > max_tokens
        kept, mask = tuple(input_ids[:max_tokens]), tuple(loss_mask[:max_tokens])
        if not any(mask) or (too_long and truncate == "drop"):
            dataset.dropped += 1
            continue
        dataset.examples.append(Example(tuple(map(shared.setdefault, kept, kept)), mask, place_of(record)))
        dataset.truncated += too_long
        dataset.tokens += len(mask)
        dataset.target_tokens += sum(mask)
    if not dataset.examples:
        rule = f"no example of {source_of(records)} keeps a token to learn (the longest has {longest} tokens)"
        raise UserError(problem("max_tokens", max_tokens, rule, f"Raise it to {max(longest, 2)}, or check the data"))
    return dataset


def _render(
    records: Sequence[dict], format: str, tokenizer: PreTrainedTokenizerBase, *, need_spans: bool
) -> list[Rendered]:
    """Every record as text with its answers' spans.

    Raises:
        UserError: the problems of all records.
    """
    endings = tuple(special_tokens(tokenizer))
    rendered: list[Rendered] = []
    problems: list[str] = []
    for number, record in enumerate(records, 1):
        reader = RecordReader(record, number)
        if format == "text":
            found: Rendered | None = Rendered(without_bos(reader.text("text"), tokenizer), eos=True)
        else:
            found = _conversation(reader, format, tokenizer, endings)
            if found and need_spans and not found.spans:
                reader.wrong(
                    "the chat template does not write the answer behind its own generation prompt, so "
                    "the answer's tokens are unknown",
                    "Use `train_on_prompt`, or another model",
                )
        if found:
            rendered.append(found)
        problems += reader.problems
    raise_all(problems)
    if tokenizer.eos_token_id is None and any(item.eos for item in rendered):
        raise UserError("model: its tokenizer has no EOS token, so no answer would end. Take another model.")
    return rendered


def _conversation(
    reader: RecordReader, format: str, tokenizer: PreTrainedTokenizerBase, endings: tuple[str, ...]
) -> Rendered | None:
    """A record as rendered messages, or None with a problem in its reader."""
    messages = reader.messages(format)
    tools = reader.tools() if format in ("chat", "sharegpt") else None
    if reader.problems:
        return None
    if not tokenizer.chat_template:
        return render_plain(messages)
    try:
        return render_chat(messages, tokenizer, tools, endings)
    except REFUSALS as error:
        reader.wrong(f"the chat template refuses it ({error})", "Change its turns, or leave it out")
        return None


def _masked(
    rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase, everything: bool, *, add_special_tokens: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """(input_ids, loss_mask) of each text, with the EOS that has to follow it."""
    special, eos = set(tokenizer.all_special_ids), tokenizer.eos_token_id
    encoded = _encode(rendered, tokenizer, add_special_tokens=add_special_tokens, offsets=not everything)
    for number, (item, (input_ids, offsets)) in enumerate(zip(rendered, encoded, strict=True), 1):
        if item.eos:  # the tokenizer's or the text's own; one comes back below
            while input_ids and input_ids[-1] == eos:
                input_ids = input_ids[:-1]
        if everything:
            mask = [True] * len(input_ids)
        elif offsets is not None:
            mask = mask_by_offsets(input_ids, item.spans, offsets[: len(input_ids)], special)
        else:
            mask = mask_by_prefixes(input_ids, item, tokenizer, add_special_tokens=add_special_tokens, record=number)
        if item.eos:
            input_ids, mask = [*input_ids, eos], [*mask, True]
        mask[:1] = [False]
        yield input_ids, mask


def _encode(
    rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool, offsets: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]] | None]]:
    """(input_ids, offsets or None) of each text, many texts at a time."""
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
        yield from zip(found["input_ids"], found["offset_mapping"] if offsets else [None] * len(texts), strict=True)


def mask_by_offsets(
    input_ids: Sequence[int], spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], special: set[int]
) -> list[bool]:
    """The loss mask: every token that holds a character of a span [start, end).

    Token ranges, found by bisection, and not character by character: tokenizers that trim their offsets (Llama 3) give
    white space none. A special token that begins before the span is left out: some swallow the white space behind them.
    """
    starts = list(accumulate((start for start, _ in offsets), max))
    ends = list(accumulate((end for _, end in offsets), max))
    mask = [False] * len(input_ids)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first < last and starts[first] < start and input_ids[first] in special:
            first += 1
        mask[first:last] = [True] * (last - first)
    return mask


def mask_by_prefixes(
    input_ids: Sequence[int],
    item: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool,
    record: int,
) -> list[bool]:
    """The loss mask with a tokenizer written in Python, which knows no offsets: by the token counts of the text's
    prefixes.

    Raises:
        UserError: a prefix's tokens are not a prefix of the tokens, so that the count would be wrong.
    """
    mask = [False] * len(input_ids)
    for span in item.spans:
        cuts = []
        for end in span:
            prefix = list(tokenizer(item.text[:end], add_special_tokens=add_special_tokens).input_ids)
            if add_special_tokens and prefix and prefix[-1] == tokenizer.eos_token_id:
                prefix.pop()
            if list(input_ids[: len(prefix)]) != prefix:
                raise UserError(
                    f"model: its Python tokenizer joins prompt and answer of record {record} in one token, "
                    "and gives no offsets. Take a model with a tokenizer.json, or use `train_on_prompt`."
                )
            cuts.append(len(prefix))
        mask[cuts[0] : cuts[1]] = [True] * (cuts[1] - cuts[0])
    return mask
