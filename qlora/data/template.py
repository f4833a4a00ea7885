"""The boundary to a chat template: somebody else's program, which comes with a model or an adapter.

    write(messages) -> the conversation as text, or Refusal with what the template said

A template may loop for years or ask for all memory. So the first conversation with other roles, or of four times the
size of what was tried, is written once in a forked child with SECONDS of processor time and BYTES of memory, it and its
beginnings; what passes there is written here, at full speed. Where no process can be forked, there is no trial.
The alternatives: a sandbox that counts loops and bounds `range` leaves `'a' * 10**10`, doubled strings, padding and
whatever comes next; a process for every conversation costs more than the tokens.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from qlora import posix
from qlora.errors import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 2  # of the processor, for a conversation that takes less than a millisecond
BYTES = 2**28  # of memory beyond what the process has, and 16 for each character of the conversation
_GROWTH = 2**20, 16  # the longest text: so many characters, and so many for each one of the conversation
_WAIT = 60  # seconds on the clock, where the processor is busy with others
_OUT_OF_MEMORY = 3

# (template, with tools) -> [(kinds of turns, characters)] of what need not be tried
_tried: dict[tuple[str, bool], list[tuple[frozenset[str], int]]] = {}
_stopped: dict[str, str] = {}  # template -> why it is not asked again


class Refusal(Exception):
    """The template does not write this conversation; the text says why."""


def write(
    messages: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    tools: list | None = None,
    *,
    prompt: bool = False,
    moment: datetime | None = None,
) -> str:
    """A conversation as text.

    Args:
        messages: `role`, `content` and whatever else the template reads.
        tokenizer: has the template.
        tools: JSON schemas.
        prompt: end with the generation prompt.
        moment: what a template that writes the date takes for now; None: now.

    Raises:
        Refusal: the template raised, was stopped, or wrote more than makes sense.
    """
    size, kinds = _size(messages, tools), frozenset(kinds_of(messages))
    template = str(tokenizer.chat_template)
    tried = _tried.setdefault((template, bool(tools)), [])
    if template not in _stopped and not any(kinds <= known and size <= most for known, most in tried):
        if why := _too_much(messages, tokenizer, tools):
            _stopped[template] = why
        tried.append((kinds, 4 * size + 1000))
    if template in _stopped:
        raise Refusal(_stopped[template])
    return _write(messages, tokenizer, tools, prompt, moment)


def kinds_of(messages: Sequence[dict]) -> list[str]:
    """What a template tells turns apart by: the role, and whether tools are called."""
    return [f"{message.get('role')}{'+' * bool(message.get('tool_calls'))}" for message in messages]


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template asks for the time of day: its text is another one tomorrow."""
    return "strftime_now" in str(tokenizer.chat_template)


def _dated(template: str, moment: datetime) -> str:
    """A template with the date of `moment` in place of its calls of the clock (transformers passes data on, and no
    functions).
    """
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda call: repr(moment.strftime(call[2])),
        template,
        flags=re.DOTALL,
    )


def _size(messages: Sequence[dict], tools: list | None) -> int:
    """About how many characters a conversation has."""
    plain = 50 * len(messages) + sum(
        len(value) for message in messages for value in message.values() if isinstance(value, str)
    )
    rest = sum(
        len(str(value)) for message in messages for value in message.values() if value and not isinstance(value, str)
    )
    return plain + rest + (len(str(tools)) if tools else 0)


def _write(
    messages: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    tools: list | None,
    prompt: bool,
    moment: datetime | None = None,
) -> str:
    """`write` without the trial."""
    own: dict[str, Any] = {}
    try:
        if moment and writes_date(tokenizer):
            own["chat_template"] = _dated(tokenizer.get_chat_template(None, tools), moment)
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **own
            )
        )
    except Exception as error:  # whatever a program of a stranger can raise
        raise Refusal(brief(error)) from error
    if len(text) > _GROWTH[0] and len(text) > _GROWTH[0] + _GROWTH[1] * _size(messages, tools):
        raise Refusal(f"it writes {len(text)} characters for a conversation of {_size(messages, tools)}")
    return text


def _too_much(messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, tools: list | None) -> str:
    """Why a child with little time and memory did not write the conversation and its beginnings with a prompt; "" if it
    did, or the template refused them.
    """
    if not hasattr(os, "fork"):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other threads do not live on in the child, which needs none
        child = os.fork()
    if child == 0:
        code = _OUT_OF_MEMORY
        try:
            os.closerange(3, 1 << 20)  # it may outlive a killed run, whose locks go with the last who holds them
            _limit(BYTES + _GROWTH[1] * _size(messages, tools))
            beginnings = [(messages[:k], True) for k in (1, 2, len(messages))]
            fits = [_fits(part, tokenizer, tools, prompt) for part, prompt in [(messages, False), *beginnings]]
            code = 0 if all(fits) else _OUT_OF_MEMORY
        finally:
            os._exit(code)
    status = _status(child)
    if status == _OUT_OF_MEMORY:
        return f"it needs more than {BYTES >> 20} MB for one conversation"
    return f"it was stopped after {SECONDS} s of one conversation" if status else ""


def _fits(messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, tools: list | None, prompt: bool) -> bool:
    """Whether memory suffices to write a conversation. What else the template says is said again where it is heard."""
    try:
        _write(messages, tokenizer, tools, prompt)
    except Refusal as refusal:
        return not isinstance(refusal.__cause__, MemoryError)
    return True


def _limit(memory: int) -> None:
    """Give this process, a child, little time and memory (bytes)."""
    resource = posix.resource
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = held + memory
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _status(child: int) -> int:
    """The exit status of a child, which is killed when it takes too long, or when we are interrupted."""
    end, pause, done = time.monotonic() + _WAIT, 0.0005, False
    try:
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                done = True
                return os.waitstatus_to_exitcode(status)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return -9
    finally:
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
