"""A conversation with a model and its adapters: lines in, replies out as they are written.

    line -> the messages so far -> generate_batch with a Listener -> the reply, which joins the messages

On a terminal there are prompts, labels and tokens per second; elsewhere each line of input gives one reply and nothing
else, so that a program can talk. Ctrl-C ends the reply at the next token, not the chat: a handler notes it, and the
listener is asked. The alternative, an exception in the middle of a forward pass, could leave a model half switched.

A reply computes what is new since the voice's last one: the keys and values of the conversation stay in memory, as many
as one generation of it needs, for each voice.

Comparing, all voices answer the same conversation, which goes on with the reply of the one that is spoken to: so the
replies differ by the adapter alone.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from qlora.data.chat import no_template
from qlora.errors import UserError, problem
from qlora.generate import Listener, Remembered, Sampling, generate_batch
from qlora.run.adapted import Voice, speaking

HELP = """\
/system TEXT   give the model a system message, or without a text take it away; the conversation begins again
/reset         begin again
/use NAME      speak to another adapter, or to the base
/compare       let every adapter and the base reply, or only the one that is spoken to
/help          show this
/quit          leave; so does Ctrl-D. Ctrl-C ends a reply
A message that begins with / is written with a space before it."""


@dataclass(frozen=True)
class Manner:
    """How replies are written. The seed of a reply is that of the sampling and its number."""

    max_new_tokens: int
    sampling: Sampling


class Screen:
    """Where a chat is seen. On a terminal it says more than the replies; errors go to standard error elsewhere."""

    def __init__(self, terminal: bool):
        self.terminal = terminal
        self._console: Any = None

    def reply(self, text: str) -> None:
        """A piece of a reply, as it is."""
        print(text, end="", flush=True)

    def note(self, text: str, style: str = "dim") -> None:
        """What is no reply; only on a terminal."""
        if self.terminal:
            if self._console is None:
                from rich.console import Console

                self._console = Console(highlight=False, markup=False)
            self._console.print(text, style=style, soft_wrap=True)

    def wrong(self, lines: Sequence[str]) -> None:
        """What cannot be done."""
        for line in lines:
            if self.terminal:
                self.note(line, "red")
            else:
                print(line, file=sys.stderr, flush=True)

    def lines(self) -> Iterator[str]:
        """What is typed, or comes in, line by line. On a terminal Ctrl-C drops the line, Ctrl-D ends the chat."""
        if not self.terminal:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
            return
        import readline  # noqa: F401  # input() then has a history, and arrow keys

        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt as stop:
                if type(stop) is not KeyboardInterrupt:  # SIGTERM or SIGHUP
                    raise
                print()
                self.note("/quit or Ctrl-D leaves")


@dataclass
class Conversation:
    """What was said, to whom, and who replies.

    Attributes:
        speaker: the voice that is spoken to.
        compare: whether the others reply as well.
        system: the system message.
        messages: user and assistant in turn, without the system message.
        replies: how many were asked for.
        remembered: what each voice computed of the conversation; adapters change keys and values.
    """

    voices: Sequence[Voice]
    speaker: Voice
    system: str | None = None
    compare: bool = False
    messages: list[dict] = field(default_factory=list)
    replies: int = 0
    remembered: dict[str, Remembered] = field(default_factory=lambda: defaultdict(Remembered))

    @property
    def repliers(self) -> list[Voice]:
        """Who replies next: the others first, so that the reply that counts is the last to be read."""
        others = [voice for voice in self.voices if voice is not self.speaker]
        return [*others, self.speaker] if self.compare else [self.speaker]


def chat(model: PreTrainedModel, conversation: Conversation, manner: Manner, screen: Screen) -> None:
    """Talk until the input ends or says /quit. Problems of a message are said, and the conversation goes on without it.

    Raises:
        UserError: the tokenizer of a voice has no chat template.
    """
    for voice in conversation.voices:
        if not voice.tokenizer.chat_template:
            raise UserError(no_template("model", voice.folder or voice.name))
    screen.note(f"{_spoken_to(conversation)} /help lists the commands.")
    for line in screen.lines():
        if not line.strip():
            continue
        if line.startswith("/"):
            try:
                if not command(conversation, line, screen):
                    return
            except UserError as error:
                screen.wrong(error.problems)
            continue
        conversation.messages.append({"role": "user", "content": line.strip()})
        try:
            _answer(model, conversation, manner, screen)
        except UserError as error:
            conversation.messages.pop()
            screen.wrong(error.problems)


def command(conversation: Conversation, line: str, screen: Screen) -> bool:
    """Do what a line that begins with / says; False ends the chat.

    Raises:
        UserError: there is no such command, or no such voice.
    """
    word, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if word == "quit":
        return False
    if word in ("reset", "system"):
        conversation.messages.clear()
        if word == "system":
            conversation.system = rest or None
        screen.note("The conversation begins again.")
    elif word == "use":
        found = [voice for voice in conversation.voices if rest in (voice.name, voice.folder)]
        if not found:
            names = ", ".join(voice.name for voice in conversation.voices)
            raise UserError(problem("use", rest or "(nothing)", f"the model speaks as {names}", "Name one of them"))
        conversation.speaker = found[0]
        screen.note(_spoken_to(conversation))
    elif word == "compare":
        if len(conversation.voices) < 2:
            rule, remedy = "only the base is here", "Start the chat with an `adapter`"
            raise UserError(problem("compare", "on", rule, remedy))
        conversation.compare = not conversation.compare
        screen.note(_spoken_to(conversation))
    elif word == "help":
        screen.note(HELP, "")
    else:
        rule = "not a command of the chat"
        raise UserError(problem("command", line.split()[0], rule, "/help lists them; a message may begin with a space"))
    return True


def _spoken_to(conversation: Conversation) -> str:
    names = ", ".join(voice.name for voice in conversation.repliers[::-1])
    return f"Speaking to {names}." if conversation.compare else f"Speaking to {conversation.speaker.name}."


def _answer(model: PreTrainedModel, conversation: Conversation, manner: Manner, screen: Screen) -> None:
    """Let everybody reply who is to; the reply of the one that is spoken to joins the messages."""
    with noted_interrupt() as interrupted:
        for voice in conversation.repliers:
            if conversation.compare:
                screen.note(f"[{voice.name}]", "bold")
                if not screen.terminal:
                    screen.reply(f"[{voice.name}] ")
            text = _reply(model, voice, conversation, manner, screen, interrupted)
            if voice is conversation.speaker and (text or not interrupted()):
                conversation.messages.append({"role": "assistant", "content": text})
            if interrupted():  # of several replies the others are not begun
                break
    if conversation.messages[-1]["role"] == "user":  # no reply that counts was begun
        conversation.messages.pop()


def _reply(
    model: PreTrainedModel,
    voice: Voice,
    conversation: Conversation,
    manner: Manner,
    screen: Screen,
    interrupted: Callable[[], bool],
) -> str:
    """One reply, shown as it is written; what there is of it where it was interrupted."""
    remembered = conversation.remembered[voice.name]
    listener, start = Listener(screen.reply, interrupted, remembered=remembered), time.perf_counter()
    sampling = manner.sampling
    with speaking(model, voice):
        (text,) = generate_batch(
            model,
            voice.tokenizer,
            [conversation.messages],
            max_new_tokens=manner.max_new_tokens,
            sampling=Sampling(sampling.temperature, sampling.top_p, (sampling.seed + conversation.replies) % 2**32),
            system=conversation.system,
            listener=listener,
        )
    conversation.replies += 1
    seconds = time.perf_counter() - start
    screen.reply("\n")
    stopped = ", interrupted" if interrupted() else ""
    screen.note(f"{listener.tokens} tokens, {listener.tokens / seconds:.1f} tokens/s{stopped}")
    return text


@contextmanager
def noted_interrupt() -> Iterator[Callable[[], bool]]:
    """While entered, the first Ctrl-C is only noted: the function tells whether it came. A second one interrupts."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):  # told to ignore it, or not ours to put back
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
