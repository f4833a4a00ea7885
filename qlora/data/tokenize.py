"""Records -> conversations -> input_ids and loss mask.

    loss_mask[i] = token i holds a character of an answer (or of its end-of-turn token), and i > 0

Every format is one thing inside, a list of messages (`qlora.data.chat` renders it), or plain text. A whole conversation
is tokenized once, so its tokens equal `apply_chat_template(messages, tokenize=True)`, and the mask is found by the
character offsets of the tokenizer. The alternative, to tokenize prompt and answer apart, gives other tokens where they
meet.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING

from qlora.data.batch import Example
from qlora.data.chat import Chat, Rendered, no_template, render_plain, without_bos
from qlora.data.formats import RecordReader, is_empty, pick_format, source_of, unused_columns
from qlora.data.records import Gathered, place_of
from qlora.data.template import Refusal
from qlora.data.typed import encode
from qlora.errors import UserError, problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # texts given to the tokenizer's threads at once
_MARGIN = 16  # tokens at a cut that are not believed


@dataclass
class Dataset:
    """Tokenized examples, where they come from, and what became of the rest."""

    examples: list[Example]
    format: str
    prints: list[bytes] = field(default_factory=list)  # of each example: a hash of its text without case and spacing
    truncated: int = 0  # examples cut at max_tokens and kept
    dropped: int = 0  # examples left out: no token in them counts, or too long with truncate="drop"
    empty: int = 0  # records without any value, passed over
    tokens: int = 0
    target_tokens: int = 0
    ends: int = 0  # answers in the examples
    learned_ends: int = 0  # of these, those whose end of turn is trained
    doubled_bos: int = 0
    empty_answers: int = 0
    skipped_turns: int = 0  # assistant turns not trained on, because the template writes them differently later
    muted_turns: int = 0  # assistant turns with weight 0
    changed_turns: int = 0  # answers that the template does not write as they stand in the record
    with_controls: int = 0  # records whose answers hold a control token of the template
    with_typed: int = 0  # records in which others typed control tokens, which stay text
    unused: list[str] = field(default_factory=list)  # columns, and keys of turns, that nobody reads

    @property
    def endless(self) -> bool:
        """Whether no example teaches where an answer ends."""
        return self.learned_ends == 0


@dataclass(frozen=True)
class _Item:
    """A record as text, and where it stands."""

    rendered: Rendered
    place: tuple[str, str] | None


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a text, or of its beginning; `longer`: it has more than an example may have."""

    input_ids: list[int]
    loss_mask: list[bool]
    learned_ends: int
    longer: bool


def tokenize(
    records: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str | None = None,
    max_tokens: int = 1024,
    train_on_prompt: bool = False,
    truncate: str = "end",
    moment: datetime | None = None,
) -> Dataset:
    """Records -> input_ids and loss mask.

    The tokens of every assistant turn with its end-of-turn token count; for `text`, and with `train_on_prompt`, every
    token but the first. The tokens of a chat equal `tokenizer.apply_chat_template(messages)`, except that control
    tokens which a user typed are text (see `qlora.data.typed`), that EOS follows where a template closes its last
    answer with no special token, and that the last answer is the user's own text where the generation prompt opens a
    thought which the template would leave out.

    Args:
        records: as `read_records` gives them.
        tokenizer: of the model.
        format: a name in COLUMNS, or None to see it from the columns.
        max_tokens: the longest example.
        train_on_prompt: learn everything, not only the answers.
        truncate: a longer example loses its tail ("end") or is dropped ("drop"); one in which no token counts any more
            is always dropped.
        moment: what a template that writes the date takes for now.

    Raises:
        UserError: every record that does not fit (the first ten), or no example is left.
    """
    if not records:
        raise UserError("data: there are no records. Give at least one.")
    numbered = [(number, record) for number, record in enumerate(records, 1) if not is_empty(record)]
    if not numbered:
        rule = f"none of its {len(records)} records holds a value"
        raise UserError(problem("data", source_of(records), rule, "Give at least one that does"))
    format = pick_format([record for _, record in numbered], format)
    if format in ("chat", "sharegpt") and not tokenizer.chat_template:
        raise UserError(no_template("data", source_of(records)))
    everything = train_on_prompt or format == "text"
    dataset, longest = Dataset([], format, empty=len(records) - len(numbered)), 0
    dataset.unused = unused_columns([record for _, record in numbered], format)
    items = _Renderer(tokenizer, format, everything, moment).render(numbered, dataset)
    templated = format != "text" and bool(tokenizer.chat_template)  # and then BOS and EOS are the template's business

    shared: dict[int, int] = {}  # equal tokens share one int object: 16 bytes a token instead of 44
    encoder = _Encoder(tokenizer, everything, max_tokens, add_special_tokens=not templated)
    for item, found in zip(items, encoder.encode(items), strict=True):
        longest = max(longest, len(found.input_ids))
        too_long = found.longer
        kept, mask = tuple(found.input_ids[:max_tokens]), tuple(found.loss_mask[:max_tokens])
        if not any(mask) or (too_long and truncate == "drop"):
            dataset.dropped += 1
            continue
        dataset.examples.append(Example(tuple(map(shared.setdefault, kept, kept)), mask, item.place))
        dataset.prints.append(print_of(item.rendered.text))
        dataset.truncated += too_long
        dataset.tokens += len(mask)
        dataset.target_tokens += sum(mask)
        dataset.ends += 1 if everything else len(item.rendered.spans)
        dataset.learned_ends += found.learned_ends
        dataset.doubled_bos += tokenizer.bos_token_id is not None and kept[:2] == (tokenizer.bos_token_id,) * 2
    if not dataset.examples:
        rule = f"no example of {source_of(records)} keeps a token to learn (the longest has {longest} tokens)"
        raise UserError(problem("max_tokens", max_tokens, rule, f"Raise it to {max(longest, 2)}, or check the data"))
    return dataset


def print_of(text: str) -> bytes:
    """A hash that is equal for texts which differ in case and white space only."""
    return hashlib.blake2b("".join(text.casefold().split()).encode(), digest_size=16).digest()


class _Renderer:
    """Records -> text and spans; all their problems at once.

    Args:
        everything: every token counts, so no spans are needed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, format: str, everything: bool, moment: datetime | None
    ) -> None:
        self.tokenizer, self.format, self.everything = tokenizer, format, everything
        self.chat = Chat(tokenizer, moment) if tokenizer.chat_template and format != "text" else None
        self._control = self.chat.own_controls() if self.chat else None
        self.problems = Gathered()

    def render(self, records: Sequence[tuple[int, dict]], dataset: Dataset) -> list[_Item]:
        """Every record (with its number) as text; what was seen on the way is counted in `dataset`.

        Raises:
            UserError: the problems of all records.
        """
        items: list[_Item] = []
        for number, record in records:
            reader = RecordReader(record, number, self.problems)
            found = self._text(reader) if self.format == "text" else self._conversation(reader, dataset)
            if found is None or not reader.good:
                continue
            if not found.text.isascii() and any("\ud800" <= char <= "\udfff" for char in found.text):
                reader.wrong("it holds half a surrogate pair", "Repair its \\u escapes")
                continue
            items.append(_Item(found, place_of(record)))
            dataset.skipped_turns += 0 if self.everything else found.skipped
            dataset.changed_turns += found.changed
        self.problems.refuse()
        if self.tokenizer.eos_token_id is None and any(item.rendered.eos for item in items):
            raise UserError("model: its tokenizer has no EOS token, so no answer would end. Take another model.")
        return items

    def _text(self, reader: RecordReader) -> Rendered:
        return Rendered(without_bos(reader.text("text"), self.tokenizer), eos=True)

    def _conversation(self, reader: RecordReader, dataset: Dataset) -> Rendered | None:
        """A record as rendered messages, or None with a problem in its reader."""
        messages = reader.messages(self.format)
        tools = reader.tools() if self.format in ("chat", "sharegpt") else None
        if reader.muted and self.everything:
            reader.wrong("a turn has weight 0, and `train_on_prompt` counts every token", "Leave one of them out")
        if not reader.good:
            return None
        answers = {n for n, message in enumerate(messages) if message["role"] == "assistant"}
        silent = [messages[n] for n in answers if not str(messages[n].get("content") or "").strip()]
        dataset.empty_answers += sum(not message.get("tool_calls") for message in silent)
        dataset.muted_turns += len(answers & reader.muted)
        dataset.unused = sorted({*dataset.unused, *reader.ignored})
        if self.chat is None:
            return render_plain(messages)
        try:
            rendered = self.chat.render(messages, tools, reader.muted)
            unused = self.chat.unused(messages, tools)
        except Refusal as refusal:
            reader.wrong(f"the chat template refuses it ({refusal})", "Change its turns, or leave it out")
            return None
        dataset.unused = sorted({*dataset.unused, *unused}) if unused else dataset.unused
        dataset.with_controls += self._holds_control(messages)
        dataset.with_typed += bool(rendered.typed)
        if "tool_calls" in unused:
            reader.wrong(
                "the chat template does not write its `tool_calls`, so the answer would be empty",
                "Write the call as text into `content`, or take a model that calls tools",
            )
        elif not self.everything and not rendered.spans and answers - reader.muted:
            self._no_span(reader, rendered)
        return rendered

    def _holds_control(self, messages: list[dict]) -> bool:
        answers = [message.get("content") for message in messages if message["role"] == "assistant"]
        return self._control is not None and any(
            isinstance(answer, str) and self._control.search(answer) for answer in answers
        )

    def _no_span(self, reader: RecordReader, rendered: Rendered) -> None:
        """The problem of a record whose answers are not where the model will write them."""
        rule = "the chat template does not write the answer behind its own generation prompt, so "
        rule += "the answer's tokens are unknown"
        if rendered.opening:
            rule += f" (the prompt opens with {rendered.opening!r}, and the answer does not)"
            reader.wrong(rule, f"Begin the answer with {rendered.opening!r}, or use `train_on_prompt`")
        else:
            reader.wrong(rule, "Use `train_on_prompt`, or another model")


class _Encoder:
    """Texts -> tokens and masks, no more of them than an example may have.

    A long text is cut before it is tokenized: its first max_tokens tokens are taken from a beginning of it, when two
    beginnings of different length agree in them; else from more of it, and at last from all. Tokenizers look a word or
    a few merges ahead, never over thousands of characters, and what they do is compared and not assumed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, everything: bool, max_tokens: int, *, add_special_tokens: bool
    ) -> None:
        self.tokenizer, self.everything, self.max_tokens = tokenizer, everything, max_tokens
        self.options = {
            "add_special_tokens": add_special_tokens,
            "return_attention_mask": False,
            "return_token_type_ids": False,
            "return_offsets_mapping": tokenizer.is_fast and not everything,
            "verbose": False,
        }
        self.special = set(tokenizer.all_special_ids)

    def encode(self, items: Sequence[_Item]) -> Iterator[_Encoded]:
        """The tokens of each text, with the EOS that has to follow it."""
        for start in range(0, len(items), _CHUNK):
            chunk = [(item.rendered, self._beginning(item.rendered.text)) for item in items[start : start + _CHUNK]]
            found = self.tokenizer([text for _, text in chunk], **self.options)
            offsets = found.get("offset_mapping") or [None] * len(chunk)
            for number, (item, text) in enumerate(chunk):
                input_ids, places = found["input_ids"][number], offsets[number]
                if item.typed:
                    input_ids, places = self._with_typed(item, text)
                yield self._masked(item, text, input_ids, places, start + number + 1)

    def _with_typed(self, item: Rendered, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """The tokens of a text, or of its beginning, in which control tokens were typed."""
        typed = [(start, min(end, len(text))) for start, end in item.typed if start < len(text)]
        return encode(text, typed, self.tokenizer, offsets=self.options["return_offsets_mapping"])

    def _beginning(self, text: str) -> str:
        """The part of a text whose first max_tokens tokens are those of the whole."""
        length, most = max(4096, 16 * self.max_tokens), self.max_tokens + 1
        while 2 * length < len(text):
            longer = text[: _border(text, length + length // 8)]
            first, second = self._ids(text[:length]), self._ids(longer)
            if len(first) > most + _MARGIN and first[:most] == second[:most]:
                return longer
            length *= 4
        return text

    def _ids(self, text: str) -> list[int]:
        options = {"add_special_tokens": self.options["add_special_tokens"], "verbose": False}
        return list(self.tokenizer(text, **options).input_ids)

    def _masked(
        self, item: Rendered, text: str, input_ids: list[int], offsets: list[tuple[int, int]] | None, number: int
    ) -> _Encoded:
        """The mask of the tokens of `text`, which is all of an item's or its beginning."""
        eos, cut = self.tokenizer.eos_token_id, len(text) < len(item.text)
        if cut:
            spans = tuple((start, min(end, len(text))) for start, end in item.spans if start < len(text))
            item = replace(item, text=text, spans=spans, closed=item.closed[: len(spans)], eos=False)
        if item.eos:  # the tokenizer's or the text's own; one comes back below
            while input_ids and input_ids[-1] == eos:
                input_ids = input_ids[:-1]
        if self.everything:
            mask = [True] * len(input_ids)
        elif offsets is not None:
            mask = mask_by_offsets(input_ids, item.spans, offsets[: len(input_ids)], self.special)
        else:
            known = self.options["add_special_tokens"]
            mask = mask_by_prefixes(input_ids, item, self.tokenizer, add_special_tokens=known, record=number)
        if item.eos:
            input_ids, mask = [*input_ids, eos], [*mask, True]
        mask[:1] = [False]
        longer = cut or len(input_ids) > self.max_tokens
        return _Encoded(input_ids, mask, self._learned_ends(item, offsets, longer), longer)

    def _learned_ends(self, item: Rendered, offsets: list[tuple[int, int]] | None, longer: bool) -> int:
        """How many answers end with a token that is trained, of those that an example keeps."""
        if self.everything:
            return not longer
        if not longer:
            return sum(item.closed) + item.eos
        if offsets is None:
            return 0
        reach = max((end for _, end in offsets[: self.max_tokens]), default=0)
        return sum(closed and end <= reach for closed, (_, end) in zip(item.closed, item.spans, strict=True))


def _border(text: str, length: int) -> int:
    """The last place before `length` where a word ends and white space begins, if there is one near; else `length`."""
    near = max(text.rfind(space, length - 256, length) for space in (" ", "\n"))
    return length if near < 1 else near


def mask_by_offsets(
    input_ids: Sequence[int], spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], special: set[int]
) -> list[bool]:
    """The loss mask: every token that holds a character of a span [start, end).

    Token ranges, found by bisection, and not character by character: tokenizers that trim their offsets (Llama 3) give
    white space none. A special token that begins before the span is left out: some swallow the white space behind them.
    """
    starts, ends = (_rising(side) for side in zip(*offsets, strict=True)) if offsets else ((), ())
    mask = [False] * len(input_ids)
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first < last and starts[first] < start and input_ids[first] in special:
            first += 1
        mask[first:last] = [True] * (last - first)
    return mask


def _rising(offsets: Sequence[int]) -> Sequence[int]:
    """The offsets, each at least the one before it: bisection needs that, and they nearly always are."""
    return offsets if list(offsets) == sorted(offsets) else list(accumulate(offsets, max))


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
            if item.typed:
                typed = [place for place in item.typed if place[1] <= end]
                prefix = encode(item.text[:end], typed, tokenizer)[0]
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
