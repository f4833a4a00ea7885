"""A template is a stranger's program: what it raises is one line, and what it may cost has an end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import tiny

from qlora.data.chat import Chat, prompt_ids, render_prompt, stop_ids
from qlora.data.template import Refusal, write, writes_date
from qlora.data.tokenize import tokenize
from qlora.errors import UserError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
RAISING = {
    "arithmetic": ("{{ 1 / 0 }}", "division by zero"),
    "range": ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "nested too deeply"),
    "memory": ("{{ 'a' * 10**10 }}", "it needs more than 256 MB"),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "it needs more than 256 MB",
    ),
    "only the prompt": ("{% if add_generation_prompt %}{{ 'a' * 10**10 }}{% endif %}b", "it needs more than 256 MB"),
    "length": ("{{ 'a' * 10**7 }}", "it writes 10000000 characters"),
    "syntax": ("{% for %}", "Expected"),
    "lookup": ("{{ {}['x'].y.z }}", "no attribute"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
}


def templated(template: str):
    own = tiny.tokenizer()
    own.chat_template = template
    return own


@pytest.mark.parametrize("kind", RAISING)
def test_whatever_a_template_does_is_one_line(kind):
    template, said = RAISING[kind]
    own = templated(template)
    for ask in (lambda: render_prompt("q", own), lambda: tokenize([{"messages": TALK}], own)):
        with pytest.raises(UserError, match="the chat template refuses it") as caught:
            ask()
        (line,) = caught.value.problems
        assert said in line and "\n" not in line and len(line) < 400
    assert stop_ids(own) == [257]  # generation falls back on EOS


def test_a_template_that_does_not_end_is_stopped():
    with pytest.raises(UserError, match="it was stopped after 2 s of one conversation"):
        tokenize([{"messages": TALK}], templated(LOOPS + "{% endfor %}"))


def test_what_was_tried_is_not_tried_again_until_it_is_longer_or_other(monkeypatch):
    tries = []
    own = templated(tiny.TEMPLATE + "{# once #}")
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: (tries.append(1), fork())[1])
    for _ in range(3):
        write(TALK, own)
        write(TALK[:1], own, prompt=True)
    assert len(tries) == 1
    write([{"role": "system", "content": "s"}, *TALK], own)
    assert len(tries) == 2
    write([{"role": "user", "content": "q" * 100_000}], own)
    assert len(tries) == 3


def test_where_no_process_can_be_forked_templates_are_written_untried(monkeypatch):
    monkeypatch.delattr("os.fork")
    assert write(TALK, templated(tiny.TEMPLATE + "{# untried #}")).endswith("a<|im_end|>\n")


def test_raw_prompts_never_touch_the_template():
    own = templated("{% for %}")
    assert stop_ids(own, raw=True) == [257] and prompt_ids("ab", own, raw=True) == own("ab").input_ids


def test_the_end_of_turn_is_found_in_the_conversation_that_a_template_takes():
    closing = tiny.TEMPLATE.replace("<|im_end|>", "<|im_start|>")  # an end that is not EOS
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + closing
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + closing
    assert stop_ids(templated(needs)) == stop_ids(templated(refuses), system="s") == [256, 257]


def test_a_date_is_the_same_for_a_whole_run():
    own = templated("{{ strftime_now('%d %b %Y') }}" + tiny.TEMPLATE)
    assert writes_date(own) and not writes_date(templated(tiny.TEMPLATE))
    first = datetime(2024, 7, 1)
    assert Chat(own, first).write(TALK).startswith("01 Jul 2024<|im_start|>user")
    (example,) = tokenize([{"messages": TALK}], own, moment=first).examples
    assert own.decode(example.input_ids).startswith("01 Jul 2024")
    with pytest.raises(Refusal, match="no now"):
        Chat(templated("{{ raise_exception('no now') }}strftime_now"), first).write(TALK)


RUN = """
import fcntl, os, sys, tiny
from qlora.data.template import write
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
own = tiny.tokenizer()
own.chat_template = sys.argv[2]
write([{"role": "user", "content": "q"}], own)
"""


def test_what_outlives_a_killed_run_holds_no_lock(tmp_path):
    """The process in which a template is tried goes on for its 2 s."""
    support = str(Path(tiny.__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([support, *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", RUN, tmp_path, LOOPS + "{% endfor %}"], env=environment)
    children, trial = Path(f"/proc/{run.pid}/task/{run.pid}/children"), ""
    while not trial and run.poll() is None:
        trial = children.read_text()
    while len(os.listdir(f"/proc/{int(trial)}/fd")) > 3:
        assert run.poll() is None
    run.kill()
    run.wait()
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    os.kill(int(trial), signal.SIGKILL)
