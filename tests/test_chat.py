"""`qlora chat`: through a pipe and on a terminal; history, system message, several adapters, Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import talkative

import qlora
from qlora.chat import Conversation, Manner, Screen, chat
from qlora.cli import main
from qlora.data.chat import prompt_ids
from qlora.errors import UserError
from qlora.generate import Sampling, generate_batch
from qlora.run.adapted import Voice, load_voices, speaking

HOUSE = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "kernels")]), "TERM": "dumb"}
TOKENS = 6
FLAGS = ["--max-new-tokens", str(TOKENS), "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and two adapters on it: one (DoRA) and two (LoRA)."""
    folder = tmp_path_factory.mktemp("chat")
    talkative().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    for seed, (name, method) in enumerate((("one", "dora"), ("two", "lora"))):
        model = qlora.load_base(str(folder / "base"), bits=4, dtype="fp32", device="cpu")
        qlora.save_adapter(tiny.adapted(model, method, seed), folder / name, tiny.tokenizer())
    return folder


@pytest.fixture(scope="module")
def loaded(made):
    return load_voices([made / "one", made / "two"], dtype="fp32", device="cpu")


def said(loaded, name: str, messages: list[str], system: str | None = None) -> str:
    """What a voice replies to user and assistant in turn."""
    model, voices = loaded
    voice = next(voice for voice in voices if voice.name == name)
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    with speaking(model, voice):
        (text,) = generate_batch(model, voice.tokenizer, [turns], max_new_tokens=TOKENS, system=system)
    return text


def talk(loaded, lines: list[str], monkeypatch, capsys, **changes) -> tuple[str, str, Conversation]:
    """(standard output, standard error, the conversation) of a chat through a pipe."""
    model, voices = loaded
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    conversation = Conversation(voices, voices[0], **changes)
    chat(model, conversation, Manner(TOKENS, Sampling()), Screen(terminal=False))
    printed = capsys.readouterr()
    return printed.out, printed.err, conversation


def test_on_a_pipe_each_line_has_one_reply_and_nothing_else(loaded, monkeypatch, capsys):
    """The replies are those of the whole history, with the first adapter."""
    out, err, conversation = talk(loaded, ["first", "", " /second"], monkeypatch, capsys)
    one = said(loaded, "one", ["first"])
    two = said(loaded, "one", ["first", one, "/second"])
    assert out == f"{one}\n{two}\n" and err == "" and one != two != said(loaded, "one", ["/second"])
    assert [message["content"] for message in conversation.messages] == ["first", one, "/second", two]


def test_commands_change_what_is_replied(loaded, monkeypatch, capsys):
    lines = [
        "a",
        "/reset",
        "a",
        "/system b",
        "a",
        "/system",
        "a",
        "/use two",
        "a",
        "/use base",
        "/reset",
        "a",
        "/quit",
        "a",
    ]
    out, err, _ = talk(loaded, lines, monkeypatch, capsys)
    first, led = said(loaded, "one", ["a"]), said(loaded, "one", ["a"], system="b")
    expected = [first, first, led, first, said(loaded, "two", ["a", first, "a"]), said(loaded, "base", ["a"])]
    assert out == "".join(f"{text}\n" for text in expected) and err == ""
    assert len(set(expected)) == 4


def test_all_voices_answer_the_same_conversation(loaded, monkeypatch, capsys):
    """Labelled; it goes on with the reply of the one that is spoken to."""
    out, _, conversation = talk(loaded, ["a", "/compare", "b", "/compare", "c"], monkeypatch, capsys)
    first = said(loaded, "one", ["a"])
    replies = {name: said(loaded, name, ["a", first, "b"]) for name in ("one", "two", "base")}
    last = said(loaded, "one", ["a", first, "b", replies["one"], "c"])
    compared = "".join(f"[{name}] {replies[name]}\n" for name in ("two", "base", "one"))
    assert out == f"{first}\n{compared}{last}\n" and len(set(replies.values())) == 3
    assert conversation.messages[3]["content"] == replies["one"]


def test_a_reply_computes_what_is_new_since_the_voices_last_one(loaded, monkeypatch, capsys):
    """Of the conversation only the last turns; each voice remembers its own, as adapters change keys and values."""
    model, fed = loaded[0], []
    handle = model.register_forward_pre_hook(
        lambda model, arguments, named: fed.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    lines = ["first " * 20, "second", "/use two", "third", "/use one", "fourth"]
    out, _, conversation = talk(loaded, lines, monkeypatch, capsys)
    handle.remove()
    prompts = [count for count in fed if count > 1]
    texts = [message["content"] for message in conversation.messages]
    whole = [len(prompt_ids(conversation.messages[:n], loaded[1][0].tokenizer)) for n in (1, 3, 5, 7)]
    assert prompts[0] == whole[0] > 120 and prompts[2] == whole[2]  # the second voice has computed nothing yet
    assert prompts[1] < whole[1] - 120 and prompts[3] < whole[3] - 120
    replies = [said(loaded, name, texts[:n]) for name, n in (("one", 1), ("one", 3), ("two", 5), ("one", 7))]
    assert out == "".join(f"{text}\n" for text in replies)


def test_a_mistake_is_a_line_and_the_chat_goes_on(loaded, monkeypatch, capsys):
    """Also a message that is too long for the model: it is as if it had not been said."""
    out, err, conversation = talk(loaded, ["/nonsense", "/use nobody", "x" * 5000, "a"], monkeypatch, capsys)
    assert out == said(loaded, "one", ["a"]) + "\n" and len(conversation.messages) == 2
    assert [line.split(":")[0] for line in err.splitlines()[:2]] == ["command=/nonsense", "use=nobody"]
    assert "tokens, and the model" in err.splitlines()[2] and len(err.splitlines()) == 3


def test_sampled_replies_differ_and_come_again(loaded, monkeypatch, capsys):
    model, voices = loaded

    def replies(seed: int) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/reset\na\n"))
        manner = Manner(TOKENS, Sampling(temperature=1.0, seed=seed))
        chat(model, Conversation(voices, voices[0]), manner, Screen(terminal=False))
        return capsys.readouterr().out

    assert replies(1) == replies(1) != replies(2)
    assert len(set(replies(1).splitlines())) == 2


def test_a_model_without_a_template_is_refused_in_one_line(loaded):
    model, (voice, *_) = loaded
    plain = tiny.tokenizer()
    plain.chat_template = None
    bare = Voice("bare", None, plain)
    with pytest.raises(UserError, match="model=bare: conversations need a chat template") as error:
        chat(model, Conversation([voice, bare], voice), Manner(TOKENS, Sampling()), Screen(terminal=False))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "base", "--compare"], "compare=True: only the base is here. Give an --adapter."),
        (["--adapter", "nowhere"], "adapter=nowhere: no such folder"),
        ([], "model=(not given): required without an adapter"),
    ],
)
def test_options_that_cannot_be(made, flags, said, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert main(["chat", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_bytes_that_are_no_text_end_no_conversation(made, loaded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), encoding="utf-8"))
    assert main(["chat", "--adapter", str(made / "one"), *FLAGS]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(said(loaded, "one", ["a"]) + "\n") and printed.err == ""


def test_ctrl_c_on_a_terminal_ends_the_reply_and_not_the_chat(made):
    """The reply that was begun is kept; at the prompt Ctrl-C drops the line; Ctrl-D leaves."""
    theirs, ours = pty.openpty()
    command = [sys.executable, "-m", "qlora", "chat", "--model", str(made / "base"), "--max-new-tokens", "100000"]
    child = subprocess.Popen(
        [*command, "--device", "cpu"], stdin=ours, stdout=ours, stderr=ours, env=ENVIRONMENT, start_new_session=True
    )
    os.close(ours)
    seen = ""

    def until(pattern: str, otherwise: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        end = time.monotonic() + 300  # beside other work a start takes a minute
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([theirs], [], [], 1)[0]:
                seen += os.read(theirs, 4096).decode(errors="replace")
            else:
                otherwise()

    def interrupt() -> None:
        child.send_signal(signal.SIGINT)

    try:
        until(r"Speaking to base.*\s+> $")
        os.write(theirs, b"tell\r")
        seen = ""
        until(r"tell\r?\n(.|\n){20}")  # some of the reply
        interrupt()
        until(r"\d+ tokens, [\d.]+ tokens/s, interrupted\s+> $")
        seen = ""
        interrupt()  # again if it came after readline drew the prompt and before it listened: CPython loses that one
        until(r"/quit or Ctrl-D leaves\s+> $", interrupt)
        os.write(theirs, b"/help\r")
        until(r"/compare +let every adapter")
        os.write(theirs, b"/quit\r")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(theirs)
