"""Conversations -> text, and the spans of it that the model is to learn. Training and generation both render here.

    chat model    the model's own template, written once
    base model    PLAIN_PROMPT, the answer, EOS; the same text for every data format, so that `qlora generate`
                  writes the prompt that training used without knowing the format

Assistant turn k is what the template writes after its own generation prompt, up to and with the end-of-turn token:
    before = render(messages[:k], add_generation_prompt);  turn = render(messages[:k+1]) - before, cut behind the token
and it counts only if the whole conversation begins with before + turn. Where it does not (Qwen3 drops earlier
thoughts), the turn is skipped and counted: a mask is right or it is not there.
The alternatives: `{% generation %}`, which few templates have, and searching for the answer, which is wrong when the
prompt quotes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qlora.errors import UserError, problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_PROMPT = "### Instruction:\n{prompt}\n\n### Response:\n"
PLAIN_SYSTEM = "{system}\n\n"  # in front of it, where there is a system message
# What a template raises on a conversation it was not written for: its own raise_exception, None + str, an empty list.
REFUSALS = (TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where the answers in it are."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()  # of each answer, the characters [start, end)
    eos: bool = False  # the answer has no end token in `text`: the tokenizer's EOS must follow, and counts
    skipped: int = 0  # assistant turns that have no span, see above


def render_chat(
    messages: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    tools: list | None = None,
    endings: tuple[str, ...] | None = None,
) -> Rendered:
    """A whole conversation through the chat template. `endings`: `special_tokens(tokenizer)`, given to save time.

    Raises:
        TemplateError, TypeError, ValueError: (REFUSALS) the template refuses the conversation.
    """
    endings = tuple(special_tokens(tokenizer)) if endings is None else endings
    text = _apply(messages, tokenizer, tools)
    spans, skipped, open_end = [], 0, False
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = k + 1 == len(messages)
        try:
            before = _apply(messages[:k], tokenizer, tools, prompt=True)
            after = text if last else _apply(messages[: k + 1], tokenizer, tools)
        except REFUSALS:
            skipped += 1  # half a conversation may be refused where the whole is not: one that the assistant opens
            continue
        turn, ended = to_end_of_turn(after[len(before) :], endings)
        if turn and after.startswith(before) and text.startswith(before + turn):
            spans.append((len(before), len(before) + len(turn)))
            open_end = last and not ended
        else:
            skipped += 1
    return Rendered(text, tuple(spans), open_end, skipped)


def render_plain(messages: list[dict]) -> Rendered:
    """[system,] user, assistant as a base model without a template sees them."""
    *system, question, answer = (message["content"] for message in messages)
    prompt = "".join(PLAIN_SYSTEM.format(system=text) for text in system) + PLAIN_PROMPT.format(prompt=question)
    return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), eos=True)


def _apply(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, tools: list | None = None, prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    return str(text)  # one conversation without `tokenize` is text


def to_end_of_turn(text: str, endings: tuple[str, ...]) -> tuple[str, bool]:
    r"""Cut behind the end-of-turn token: "4<|im_end|>\n" -> "4<|im_end|>", True.

    That is the first of the special tokens the text closes with (Phi-3 closes "<|end|>\n<|endoftext|>"). Text that
    closes with none comes back whole, with False.
    """
    end, rest = None, text.rstrip()
    while rest.endswith(endings):
        end = len(rest)
        rest = rest[: -max(len(token) for token in endings if rest.endswith(token))].rstrip()
    return (text, False) if end is None else (text[:end], True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.items()
    tokens = {token.content: number for number, token in added if token.special and token.content}
    return tokens | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


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
        system: a system message in front of it.
        raw: leave a text as it stands.

    Raises:
        UserError: the template refuses the prompt, or messages meet a base model.
    """
    if raw and isinstance(prompt, str):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise UserError(no_template("prompt", f"{len(messages)} messages"))
        return render_plain([*messages, {"role": "assistant", "content": ""}]).text
    try:
        return _apply(messages, tokenizer, prompt=True)
    except REFUSALS as error:
        raise UserError(
            problem(
                "prompt",
                repr(prompt)[:60],
                f"the chat template refuses it ({error})",
                "Leave out what it names, or write the whole prompt and use `raw`",
            )
        ) from error


def prompt_ids(
    prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """The tokens of `render_prompt`, encoded as in training: the template's BOS or the tokenizer's, never both."""
    templated = bool(tokenizer.chat_template) and not raw
    text = render_prompt(prompt, tokenizer, system=system, raw=raw)
    text = text if templated else without_bos(text, tokenizer)
    input_ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False).input_ids)
    ended = not templated and len(input_ids) > 1 and input_ids[-1] == tokenizer.eos_token_id
    return input_ids[:-1] if ended else input_ids


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`text` without a BOS written at its start, if the tokenizer is going to put one there."""
    return text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token is not None and tokenizer.bos_token_id in tokenizer("").input_ids[:1]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: EOS, and the end-of-turn token that the chat template writes."""
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        endings = special_tokens(tokenizer)
        probe = render_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
        stops |= {
            number
            for token, number in endings.items()
            for start, end in probe.spans
            if probe.text[start:end].endswith(token)
        }
    return sorted(stops)
