"""Conversations -> text, and the spans of it that the model is to learn. Training and generation both render here.

    chat model    the model's own template, written once
    base model    PLAIN_PROMPT, the answer, EOS; the same text for every data format, so that `qlora generate`
                  writes the prompt that training used without knowing the format

Assistant turn k is what the template writes after its own generation prompt, up to and with the end of the turn:
    before = write(messages[:k], prompt);  turn = write(messages[:k+1]) - before
    tail   = what the template writes behind a neutral answer in that place
The end of the turn is the first control token of the tail, and of nothing else: an answer may close with control tokens
of its own. A turn counts only if the whole conversation begins with it. Where it does not (Qwen3 drops earlier
thoughts), the turn is skipped and counted: a mask is right or it is not there.
Where the prompt opens the thought (DeepSeek-R1, QwQ: "<think>\n"), the last answer is the rest of the user's own text.
The alternatives: `{% generation %}`, which few templates have, and searching for the answer, which is wrong when the
prompt quotes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from qlora.data.template import Refusal, kinds_of, write
from qlora.data.typed import encode, mark, unmark
from qlora.errors import UserError, problem, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"
PLAIN_SYSTEM = "{system}\n\n"  # in front of it, where there is a system message
_NEUTRAL = "Zq7"  # an answer that no template knows


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where the answers in it are."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()  # of each answer, the characters [start, end)
    closed: tuple[bool, ...] = ()  # of each span, whether it ends with the token that ends a turn
    eos: bool = False  # the answer has no end token in `text`: the tokenizer's EOS must follow, and counts
    skipped: int = 0  # assistant turns that have no span, see above
    changed: int = 0  # answers that the template does not write as they stand in the record
    opening: str = ""  # what the generation prompt writes of the answer, where the last turn was skipped for it
    typed: tuple[tuple[int, int], ...] = ()  # control tokens that are text, see `qlora.data.typed`


class Chat:
    """A tokenizer's chat template, and what it has been asked. `moment`: what it takes for now, None: now."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, moment: datetime | None = None):
        self.tokenizer, self.moment = tokenizer, moment
        self.controls = control_tokens(tokenizer)
        self._special = tuple(special_tokens(tokenizer))
        self._tails: dict[tuple, str | None] = {}
        self._unused: dict[tuple, bool] = {}
        self._arguments_as_text: bool | None = None

    def write(self, messages: Sequence[dict], tools: list | None = None, prompt: bool = False) -> str:
        """The text of a conversation, with `prompt` up to where the answer begins.

        Raises:
            Refusal: see `template.write`.
        """
        return write(messages, self.tokenizer, tools, prompt=prompt, moment=self.moment)

    def render(self, messages: list[dict], tools: list | None = None, muted: Container[int] = ()) -> Rendered:
        """A whole conversation. `muted`: the numbers of assistant turns that are not to be learned.

        Raises:
            Refusal: the template refuses the conversation.
        """
        rendered = self._render(mark(messages, self.typed), tools, muted)
        text, typed, spans = unmark(rendered.text, rendered.spans)
        return replace(rendered, text=text, typed=typed, spans=spans)

    def _render(self, messages: list[dict], tools: list | None, muted: Container[int]) -> Rendered:
        """`render` of messages in which what was typed is marked."""
        messages, text = self.with_arguments(messages, tools)
        spans, closed, skipped, changed, opening = [], [], 0, 0, ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant" or k in muted:
                continue
            found = self._turn(messages, k, tools, text)
            if found is None and k + 1 == len(messages):
                text, found, opening = self._continued(messages, tools, text)
            if found is None:
                skipped += 1
                continue
            start, end, ended = found
            spans.append((start, end))
            closed.append(ended)
            changed += _squeezed(message.get("content")) not in _squeezed(text[max(0, start - 100) : end])
        eos = bool(spans) and messages[-1]["role"] == "assistant" and spans[-1][1] == len(text) and not closed[-1]
        return Rendered(text, tuple(spans), tuple(closed), eos, skipped, changed, opening)

    def _turn(self, messages: list[dict], k: int, tools: list | None, text: str) -> tuple[int, int, bool] | None:
        """(start, end, closed) of assistant turn k in `text`; None where it is not written behind its own prompt."""
        try:
            before = self.write(messages[:k], tools, prompt=True)
            after = text if k + 1 == len(messages) else self.write(messages[: k + 1], tools)
        except Refusal:  # half a conversation may be refused where the whole is not: one that the assistant opens
            return None
        turn = after[len(before) :]
        length, closed = self._end(turn, messages[:k], tools)
        if not length or not after.startswith(before) or not text.startswith(before + turn[:length]):
            return None
        return len(before), len(before) + length, closed

    def _continued(
        self, messages: list[dict], tools: list | None, text: str
    ) -> tuple[str, tuple[int, int, bool] | None, str]:
        """(text, its last turn, "") where the prompt opens what the last answer begins with; else the text as it was,
        None, and what the prompt opens.
        """
        try:
            before = self.write(messages[:-1], tools, prompt=True)
        except Refusal:
            return text, None, ""
        opening = before[shared(before, text) :]
        mark, answer = opening.strip(), str(messages[-1].get("content") or "").lstrip()
        tail = self._ask_tail(messages[:-1], tools)
        if not mark or tail is None or messages[-1].get("tool_calls") or not answer.startswith(mark):
            return text, None, mark
        rest = answer[len(mark) :]
        rest = rest.lstrip() if opening[-1].isspace() else rest
        cut = self._first_control(tail)
        end = len(before) + len(rest) + (cut or 0)
        return before + rest + tail, (len(before), end, cut is not None), ""

    def _end(self, turn: str, messages: list[dict], tools: list | None) -> tuple[int, bool]:
        """How many characters of a turn are to be learned, and whether they end with the token that ends a turn."""
        for tail in self._tails_of(messages, tools):
            if tail is not None and turn.endswith(tail):
                cut = self._first_control(tail)
                return (len(turn), False) if cut is None else (len(turn) - len(tail) + cut, True)
        rest = turn.rstrip()  # a call of tools may end in another way than text (Llama 3.1's <|eom_id|>)
        return (len(rest), True) if rest.endswith(self._special) else (len(turn), False)

    def _tails_of(self, messages: list[dict], tools: list | None) -> Iterator[str | None]:
        """What ends a turn behind these messages: as it was for others like them, then as it is for these."""
        kinds = kinds_of(messages)
        key = (bool(tools), *kinds[:1], *kinds[-2:])
        if key not in self._tails:
            self._tails[key] = self._ask_tail(messages, tools)
            yield self._tails[key]
        else:
            yield self._tails[key]
            yield self._ask_tail(messages, tools)

    def _ask_tail(self, messages: list[dict], tools: list | None) -> str | None:
        """What the template writes behind a neutral answer to these messages; None where it writes no such answer."""
        try:
            text = self.write([*messages, {"role": "assistant", "content": _NEUTRAL}], tools)
        except Refusal:
            return None
        _, found, tail = text.rpartition(_NEUTRAL)
        return tail if found else None

    def _first_control(self, tail: str) -> int | None:
        """Where the first control token of `tail` ends; None if there is none."""
        places = ((tail.find(token), -len(token)) for token in self.controls)
        start, length = min(((at, length) for at, length in places if at >= 0), default=(-1, 0))
        return None if start < 0 else start - length

    def with_arguments(self, messages: list[dict], tools: list | None) -> tuple[list[dict], str]:
        """(messages, text), the arguments of tool calls as the template needs them: an object, or JSON text.

        OpenAI's are text; most templates want an object, DeepSeek's wants text, and one that prints what it gets would
        print a Python dictionary.

        Raises:
            Refusal: the template refuses both.
        """
        if not any(message.get("tool_calls") for message in messages):
            return messages, self.write(messages, tools)
        if self._arguments_as_text is None:
            objects = _with_arguments(messages, as_text=False)
            try:
                text = self.write(objects, tools)
            except Refusal:
                text = self.write(_with_arguments(messages, as_text=True), tools)
                self._arguments_as_text = True
            else:
                given = [a for m in objects for a in _arguments(m) if isinstance(a, dict) and a]
                if given:
                    self._arguments_as_text = any(str(a) in text and json.dumps(a) not in text for a in given)
        messages = _with_arguments(messages, as_text=bool(self._arguments_as_text))
        return messages, self.write(messages, tools)

    def unused(self, messages: list[dict], tools: list | None) -> list[str]:
        """What of a conversation the template does not write: `tools`, and keys of turns beside role and content."""
        keys = {key for message in messages for key, value in message.items() if value not in (None, "", [], {})}
        keys -= {"role", "content"}
        if not keys and not tools:
            return []
        messages, text = self.with_arguments(messages, tools)
        return sorted(
            key
            for key in (*keys, *(["tools"] if tools else []))
            if self._writes_the_same_without(key, messages, tools, text)
        )

    def _writes_the_same_without(self, key: str, messages: list[dict], tools: list | None, text: str) -> bool:
        """Whether the template does not look at a key. Asked once for conversations in which it stands alike."""
        places = tuple(number for number, message in enumerate(messages) if message.get(key))
        shape = (key, bool(tools), tuple(kinds_of(messages)), places)
        if shape not in self._unused:
            without = [{name: value for name, value in message.items() if name != key} for message in messages]
            try:
                self._unused[shape] = self.write(without, None if key == "tools" else tools) == text
            except Refusal:  # it needs the key
                self._unused[shape] = False
        return self._unused[shape]

    def own_controls(self) -> re.Pattern[str] | None:
        """What finds the control tokens that the template itself marks turns with; None if it has none."""
        talk = [{"role": "user", "content": _NEUTRAL}, {"role": "assistant", "content": _NEUTRAL}]
        try:
            text = self.write(talk) + self.write(talk[:1], prompt=True)
        except Refusal:
            text = str(self.tokenizer.chat_template)
        return _any_of([token for token in self.controls if token in text])

    @cached_property
    def typed(self) -> re.Pattern[str] | None:
        """What finds the control tokens that stay text where a user types them: special ones, and the template's own.

        Others, like Qwen 3's `<tool_response>`, are words that templates look for in what they are given.
        """
        own = self.own_controls()
        return _any_of([*self._special, *(token for token in self.controls if own and own.fullmatch(token))])

    def ends(self, system: str | None = None) -> list[int]:
        """The tokens that end an answer by this template; none where it refuses a plain question."""
        question = {"role": "user", "content": "a"}
        led = [{"role": "system", "content": system or "a"}, question]
        for asked in (led, [question]) if system else ([question], led):
            tail = self._ask_tail(asked, None)
            if tail is not None:
                cut = self._first_control(tail)
                return [number for token, number in self.controls.items() if cut and tail[:cut].endswith(token)]
        return []


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """What finds any of these texts, the longest first; None if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def shared(one: Sequence[object], two: Sequence[object]) -> int:
    """How many characters two texts, or tokens two rows, begin with alike."""
    unlike = (at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(unlike, min(len(one), len(two)))


def _squeezed(content: object) -> str:
    """Text without white space, which templates strip and add."""
    return "".join(content.split()) if isinstance(content, str) else ""


def _arguments(message: dict) -> list[object]:
    """The arguments of a message's tool calls."""
    return [call.get("function", call).get("arguments") for call in message.get("tool_calls") or []]


def _with_arguments(messages: list[dict], *, as_text: bool) -> list[dict]:
    """The messages with all arguments of tool calls as JSON text, or all as objects."""

    def turned(value: object) -> object:
        if as_text:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return json.loads(value) if isinstance(value, str) else value

    def called(call: dict) -> dict:
        if "function" in call:
            return {**call, "function": called(call["function"])}
        return {**call, "arguments": turned(call["arguments"])} if "arguments" in call else call

    return [
        {**message, "tool_calls": [called(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def render_plain(messages: list[dict]) -> Rendered:
    """[system,] user, assistant as a base model without a template sees them."""
    *system, question, answer = (message["content"] for message in messages)
    prompt = "".join(PLAIN_SYSTEM.format(system=text) for text in system) + PLAIN_PROMPT.format(prompt=question)
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), (False,), eos=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokenizer's special tokens. An empty one, or one of white space, marks nothing."""
    added = tokenizer.added_tokens_decoder.items()
    tokens = {token.content: number for number, token in added if token.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: number for token, number in tokens.items() if token.strip()}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that a template can mark its turns with: the special ones, and others that were added to
    the vocabulary (a `<|im_end|>` that was not declared special).
    """
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return added | special_tokens(tokenizer)


def no_template(name: str, value: object) -> str:
    """The problem of conversations that meet a base model."""
    return problem(
        name,
        value,
        "conversations need a chat template, and this model's tokenizer has none",
        "Take an instruct model, or data with the columns prompt and completion",
    )


def render_prompt(
    prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, raw: bool = False
) -> str:
    """The text before the answer, as training wrote it.

    Args:
        prompt: the user's text, or the messages so far.
        tokenizer: of the model.
        system: a system message in front of it, where it has none of its own.
        raw: leave a text as it stands.

    Raises:
        UserError: the template refuses the prompt, or messages meet a base model.
    """
    if raw and isinstance(prompt, str):
        return prompt
    return _rendered_prompt(prompt, tokenizer, system).text


def _rendered_prompt(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, system: str | None) -> Rendered:
    """`render_prompt`, and where it holds control tokens that were typed."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    led = bool(messages) and messages[0]["role"] == "system"  # by one of its own
    messages = [{"role": "system", "content": system}, *messages] if system and not led else messages
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise UserError(no_template("prompt", f"{len(messages)} messages"))
        return render_plain([*messages, {"role": "assistant", "content": ""}])
    try:
        text, typed, _ = unmark(write(mark(messages, Chat(tokenizer).typed), tokenizer, prompt=True))
    except Refusal as refusal:
        raise UserError(
            problem(
                "prompt",
                shortened(repr(prompt), 80),
                f"the chat template refuses it ({refusal})",
                "Leave out what it names, or write the whole prompt and use `raw`",
            )
        ) from refusal
    return Rendered(text, typed=typed)


def prompt_ids(
    prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """The tokens of `render_prompt`, encoded as in training: the template's BOS or the tokenizer's, never both."""
    if tokenizer.chat_template and not raw:
        rendered = _rendered_prompt(prompt, tokenizer, system)
        return encode(rendered.text, rendered.typed, tokenizer)[0]
    text = without_bos(render_prompt(prompt, tokenizer, system=system, raw=raw), tokenizer)
    input_ids = list(tokenizer(text, verbose=False).input_ids)
    ended = len(input_ids) > 1 and input_ids[-1] == tokenizer.eos_token_id
    return input_ids[:-1] if ended else input_ids


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` without a BOS written at its start, if the tokenizer is going to put one there."""
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.bos_token) and tokenizer.bos_token_id in tokenizer("").input_ids[:1]


def stop_ids(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, raw: bool = False) -> list[int]:
    """The tokens that end an answer: EOS, and the end of turn that the chat template writes.

    With `raw`, or where the template refuses a plain question (with `system`, if given), EOS alone.
    """
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if tokenizer.chat_template and not raw:
        stops |= set(Chat(tokenizer).ends(system))
    return sorted(stops)
