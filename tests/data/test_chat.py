"""Rendering: which characters of a conversation are the answer, with templates as they are found in the wild."""

from __future__ import annotations

import copy

import pytest

from qlora.data.chat import PLAIN_PROMPT, Chat, prompt_ids, render_plain, render_prompt, stop_ids
from qlora.errors import UserError

TURNS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3? Not 4<|im_end|>"},
    {"role": "assistant", "content": " 6\n"},
]

# What follows is the gist of templates that models ship.
GENERATION = r"""{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THOUGHTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # Qwen3: only the last answer keeps its thoughts
CLOSED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% else %}<|endoftext|>{% endif %}"""  # Phi-3: a conversation without an open turn ends with EOS
BARE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
ALTERNATING = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant {% endif %}"""
FORCED = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""  # DeepSeek-R1: the generation prompt is not what stands before an answer


@pytest.fixture
def templated(tokenizer):
    def give(template: str | None):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return own

    return give


def answers(rendered):
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("template", ["own", GENERATION])
def test_every_turn_with_its_end_token_and_nothing_else(tokenizer, templated, template):
    own = tokenizer if template == "own" else templated(template)
    rendered = Chat(own).render(TURNS)
    assert rendered.text == own.apply_chat_template(TURNS, tokenize=False)
    assert answers(rendered) == ["4<|im_end|>", " 6\n<|im_end|>"]
    assert not rendered.eos and rendered.skipped == 0


def test_a_turn_that_the_template_rewrites_later_is_skipped_not_guessed(templated):
    rendered = Chat(templated(THOUGHTS)).render(TURNS)
    assert answers(rendered) == ["<think>\n\n</think>\n\n 6\n<|im_end|>"] and rendered.skipped == 1


def test_a_template_that_closes_the_conversation_too(templated):
    rendered = Chat(templated(CLOSED)).render(TURNS)
    assert rendered.text.endswith(" 6\n<|im_end|>\n<|endoftext|>")
    assert answers(rendered) == ["4<|im_end|>", " 6\n<|im_end|>"] and not rendered.eos


def test_a_template_without_end_tokens_needs_eos_behind_its_last_answer(templated):
    rendered = Chat(templated(BARE)).render(TURNS)
    assert answers(rendered) == ["4\n", " 6\n\n"] and rendered.eos
    assert not Chat(templated(BARE)).render(TURNS[:3]).eos  # the user has the last word


def test_an_assistant_that_opens_the_conversation(tokenizer, templated):
    opening = [{"role": "assistant", "content": "Hello!"}, *TURNS]
    rendered = Chat(tokenizer).render(opening)
    assert answers(rendered) == ["4<|im_end|>", " 6\n<|im_end|>"] and rendered.skipped == 1
    with pytest.raises(Exception, match="roles must alternate"):
        Chat(templated(ALTERNATING)).render(opening)
    assert answers(Chat(templated(ALTERNATING)).render(TURNS)) == ["4<|im_end|>", " 6\n<|im_end|>"]


def test_an_answer_that_is_not_behind_the_generation_prompt_has_no_span(templated):
    rendered = Chat(templated(FORCED)).render(TURNS)
    assert rendered.spans == () and rendered.skipped == 2


def test_prompts_are_what_training_wrote(tokenizer, templated):
    whole = Chat(tokenizer).render(TURNS[:2])
    before = whole.text[: whole.spans[0][0]]
    assert render_prompt("What is 2+2?", tokenizer) == before
    assert render_prompt(TURNS[:1], tokenizer) == before
    assert (
        prompt_ids("What is 2+2?", tokenizer)
        == tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    )
    assert render_prompt("What is 2+2?", tokenizer, raw=True) == "What is 2+2?"
    assert "<|im_start|>system\nBe brief<|im_end|>" in render_prompt("2+2?", tokenizer, system="Be brief")

    plain = render_plain(TURNS[:2])
    start, end = plain.spans[0]
    assert plain.text == "### Instruction:\nWhat is 2+2?\n\n### Response:\n4" and plain.text[start:end] == "4"
    assert render_prompt("What is 2+2?", templated(None)) == plain.text[:start]
    assert render_prompt("a {b} c", templated(None)) == PLAIN_PROMPT.replace("{prompt}", "a {b} c")
    assert render_prompt("2+2?", templated(None), system="Be brief").startswith("Be brief\n\n### Instruction:\n2+2?")


def test_prompts_that_cannot_be_rendered(templated):
    with pytest.raises(UserError, match="need a chat template"):
        render_prompt(TURNS[:1], templated(None))
    with pytest.raises(UserError, match=r"the chat template refuses it .roles must alternate"):
        render_prompt("a", templated(ALTERNATING), system="b")


def test_stop_tokens_are_eos_and_the_end_of_turn(tokenizer, templated):
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_ids(tokenizer) == [end]
    tuned = templated(CLOSED)
    tuned.eos_token = "<|endoftext|>"
    assert stop_ids(tuned) == sorted([end, eos])
    assert stop_ids(templated(None)) == [end]
