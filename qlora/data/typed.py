"""Control tokens that somebody typed stay text: `<|im_end|>` in a question does not end the turn.

    mark      "say <|im_end|>" -> "say A<|im_end|>B" with two noncharacters A, B, before the template writes it
    unmark    the written text without A and B, and where what stood between them is
    encode    those places as ordinary text, all else with the control tokens that the template wrote

What an assistant says is not marked: its calls and thoughts are control tokens that the model has to write. The
alternative, to tokenize every turn apart, gives other tokens where template and text meet. transformers has this as
`apply_chat_template(..., sanitize_control_tokens=True)` since 5.23, but without offsets, which the loss mask needs.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARKS = "\ufdd0", "\ufdd1"  # noncharacters: no text that is exchanged may hold them
_ANY_MARK = re.compile(f"[{''.join(_MARKS)}]")


def mark(messages: Sequence[dict], controls: re.Pattern[str] | None) -> list[dict]:
    """The messages with marks around every control token that is not an assistant's."""
    if controls is None:
        return list(messages)
    return [
        message if message["role"] == "assistant" else {**message, "content": _marked(message.get("content"), controls)}
        for message in messages
    ]


def _marked(content: Any, controls: re.Pattern[str]) -> Any:
    """A text, or the texts in parts of a content."""
    if isinstance(content, str):
        return controls.sub(f"{_MARKS[0]}\\g<0>{_MARKS[1]}", _ANY_MARK.sub("", content))
    if isinstance(content, list):
        return [_marked(part, controls) for part in content]
    if isinstance(content, dict):
        return {key: _marked(value, controls) for key, value in content.items()}
    return content


def unmark(text: str, spans: Sequence[Span] = ()) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
    """(text without marks, where what they enclosed is in it, `spans` of the marked text in it)."""
    places = [match.start() for match in _ANY_MARK.finditer(text)]
    if not places:
        return text, (), tuple(spans)
    starts = [at for at in places if text[at] == _MARKS[0]]
    ends = [text.find(_MARKS[1], at) for at in starts]

    def moved(at: int) -> int:
        return at - bisect_left(places, at)

    typed = tuple((moved(start), moved(end)) for start, end in zip(starts, ends, strict=True) if end >= 0)
    return _ANY_MARK.sub("", text), typed, tuple((moved(start), moved(end)) for start, end in spans)


def encode(
    text: str, typed: Sequence[Span], tokenizer: PreTrainedTokenizerBase, *, offsets: bool = False
) -> tuple[list[int], list[Span] | None]:
    """(input_ids, the characters of each token if `offsets`) of a text that a template wrote.

    Args:
        text: without marks.
        typed: the places in it that are no control tokens, in order.
        tokenizer: of the model.
        offsets: give them; each token of a typed place gets the whole place.
    """
    input_ids: list[int] = []
    found: list[Span] = []
    at = 0
    for start, end in [*typed, (len(text), len(text))]:
        for first, last, as_text in ((at, start, False), (start, end, True)):
            if first == last:
                continue
            piece = text[first:last]
            ids, places = _piece(piece, tokenizer, as_text=as_text, inside=first > 0, offsets=offsets)
            input_ids += ids
            found += [(first, last)] * len(ids) if as_text else [(first + a, first + b) for a, b in places]
        at = end
    return input_ids, found if offsets else None


def _piece(
    piece: str, tokenizer: PreTrainedTokenizerBase, *, as_text: bool, inside: bool, offsets: bool
) -> tuple[list[int], list[Span]]:
    """The tokens of a part of a text. `inside`: text stands before it, so no tokenizer may put a space there."""

    def tokens(part: str) -> tuple[list[int], list[Span]]:
        options = {"add_special_tokens": False, "split_special_tokens": as_text, "verbose": False}
        got = tokenizer(part, return_offsets_mapping=offsets and not as_text, **options)
        return list(got.input_ids), list(got.get("offset_mapping") or ())

    ids, places = tokens(piece)
    if inside:  # behind a line break, which is taken away again
        line, _ = tokens("\n")
        led, led_places = tokens("\n" + piece)
        if led[: len(line)] == line:
            ids, places = led[len(line) :], [(max(a - 1, 0), b - 1) for a, b in led_places[len(line) :]]
    if as_text and len(piece) > 1 and tokenizer.convert_tokens_to_ids(piece) in ids:  # not a special one: taken apart
        halves = (piece[:1], piece[1:])
        ids = [
            token for half in halves for token in _piece(half, tokenizer, as_text=True, inside=True, offsets=False)[0]
        ]
    return ids, places
