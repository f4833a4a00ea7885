"""Masks of the families' templates against transformers' `{% generation %}` masks, on conversations made by chance.

A template lies in templates/ with the marks of `{% generation %}`; what we render has none. The formats are those that
the families document; each stands on a tokenizer of bytes and the family's control tokens. What
users type of these stays text.
"""

# ruff: noqa: RUF001  # DeepSeek's tokens have wide bars

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import tiny

from qlora.data.chat import Chat
from qlora.data.tokenize import tokenize

FOLDER = Path(__file__).parent / "templates"
IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
CALLS = [
    f"<｜tool▁{what}｜>" for what in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin")
]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *CALLS, "<｜end▁of▁sentence｜>"]
# template: (control tokens, the first of them BOS and the last EOS; what its conversations may have)
FAMILIES = {
    "chatml": (IM, "system"),
    "llama2": (["<s>", "</s>"], "system alternating"),
    "llama3": (LLAMA3, "system"),
    "llama31": (LLAMA3, "system tools one"),
    "qwen2": (IM, "system"),
    "qwen25": (IM, "system tools"),
    "qwen3": (IM, "system thoughts"),
    "mistral": (["<s>", "</s>"], "system alternating"),
    "mistral_v3": (["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "</s>"], "system tools late"),
    "gemma": (["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], ""),
    "phi3": (["<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], "system"),
    "phi4": ([*IM[:2], "<|im_sep|>", IM[2]], "system"),
    "zephyr": (["<s>", "</s>"], "system"),
    "deepseek_v3": (DEEPSEEK, "system tools"),
}
WORDS = [
    "4",
    "Paris.",
    " two\n\nlines ",
    "naïve 東京 😀",
    "",
    "    return x\n",
    "assistant\n4",
    "</think>",
    "[/INST] b",
]


def own_tokenizer(name: str, controls: list[str], marked: bool = False):
    """Bytes, the family's control tokens and its template, with or without the marks."""
    own = tiny.tokenizer()
    own.add_special_tokens({"bos_token": controls[0], "eos_token": controls[-1]})
    own.add_special_tokens({"additional_special_tokens": controls[1:-1]})
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    own.chat_template = text if marked else re.sub(r"{% (end)?generation %}", "", text)
    return own


def conversation(dice: random.Random, controls: list[str], features: str) -> tuple[list[dict], list | None]:
    """Messages and tools: turns, a system message, calls, control tokens in what is said."""

    def said() -> str:
        parts = [dice.choice([*WORDS, *(controls if dice.random() < 0.3 else [])]) for _ in range(dice.randint(1, 3))]
        thought = "thoughts" in features and dice.random() < 0.3
        text = " ".join(part for part in parts if not ("thoughts" in features and "think>" in part))
        return f"<think>\nhm\n</think>\n\n{text}" if thought else text

    messages = [{"role": "system", "content": "Be brief."}] if "system" in features and dice.random() < 0.4 else []
    tools = [{"type": "function", "function": {"name": "f"}}] if "tools" in features and dice.random() < 0.5 else None
    for _ in range(dice.randint(1, 4)):
        messages.append({"role": "user", "content": said()})
        if tools and dice.random() < 0.6:
            count = 1 if "one" in features else dice.randint(1, 2)
            names = dice.choices(["f", "python"], k=count)
            calls = [{"function": {"name": n, "arguments": {"city": dice.choice(WORDS[:4])}}} for n in names]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            messages.append({"role": "tool", "content": "22"})
        messages.append({"role": "assistant", "content": said()})
    if dice.random() < 0.2 and "late" not in features and "thoughts" not in features:
        messages.append({"role": "user", "content": "bye"})
    return messages, tools


def as_text(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of calls as DeepSeek's template takes them."""
    found = json.loads(json.dumps(messages))
    for message in found:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return found


def masked_by_transformers(
    oracle, messages: list[dict], tools: list | None, controls: list[str]
) -> tuple[list[int], list[bool]]:
    """(input_ids, mask) of transformers. A control token that is typed becomes a character that no conversation holds,
    and in the tokens the bytes of its text.
    """
    stands = {token: chr(14 + number) for number, token in enumerate(controls)}
    assert len(stands) < 18
    given = [
        message if message["role"] == "assistant" else {**message, "content": replaced(message["content"], stands)}
        for message in messages
    ]
    found = oracle.apply_chat_template(given, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    texts = {
        oracle(stand).input_ids[0]: [number for character in token for number in oracle(character).input_ids]
        for token, stand in stands.items()
    }
    pairs = [
        (number, bool(counts))
        for token, counts in zip(found["input_ids"], found["assistant_masks"], strict=True)
        for number in texts.get(token, [token])
    ]
    return [number for number, _ in pairs], [counts for _, counts in pairs]


def replaced(text: str, stands: dict[str, str]) -> str:
    for token in sorted(stands, key=len, reverse=True):
        text = text.replace(token, stands[token])
    return text


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_equal_the_generation_masks_of_transformers(name):
    controls, features = FAMILIES[name]
    own, oracle = own_tokenizer(name, controls), own_tokenizer(name, controls, marked=True)
    dice, skipped = random.Random(name), 0
    for _ in range(40):
        messages, tools = conversation(dice, controls, features)
        given = as_text(messages) if name == "deepseek_v3" else messages
        expected_ids, meant = masked_by_transformers(oracle, given, tools, controls)
        found = tokenize([{"messages": messages, "tools": tools}], own, max_tokens=10**6)
        (example,) = found.examples
        assert list(example.input_ids) == expected_ids
        mask = list(example.loss_mask)
        skipped += found.skipped_turns
        if found.skipped_turns:  # meant: only where this template writes an earlier turn in another way at its time
            assert "thoughts" in features or ("late" in features and messages[0]["role"] == "system")
            assert all(there for here, there in zip(mask, meant, strict=True) if here)
            last = len(meant) - 1 - meant[::-1].index(True)
            first = max((i for i in range(last) if not meant[i]), default=-1) + 1
            assert mask[first : last + 1] == [True] * (last + 1 - first)
        else:
            assert mask == meant
        turns = sum(message["role"] == "assistant" for message in messages)
        assert found.ends == found.learned_ends == turns - found.skipped_turns
    assert (skipped > 0) == ("thoughts" in features or "late" in features)


def test_a_prompt_that_opens_the_thought_is_followed_by_the_users_own_text():
    own = own_tokenizer("deepseek_r1", DEEPSEEK)
    question = {"role": "user", "content": "q"}
    for answer in ("<think>\nbecause\n</think>\n\nfour", "\n<think>because\n</think>\n\nfour"):
        rendered = Chat(own).render([question, {"role": "assistant", "content": answer}])
        prompt = own.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        start, end = rendered.spans[0]
        assert rendered.text[:start] == prompt and prompt.endswith("<think>\n")
        assert rendered.text[start:end] == "because\n</think>\n\nfour<｜end▁of▁sentence｜>"
        assert (rendered.skipped, rendered.changed, rendered.closed) == (0, 0, (True,))
    without = Chat(own).render([question, {"role": "assistant", "content": "four"}])
    assert without.spans == () and without.opening == "<think>"


def test_a_thought_that_the_template_drops_is_counted():
    own = own_tokenizer("deepseek_r1", DEEPSEEK)
    own.chat_template = own.chat_template.replace("<think>\\n", "")
    record = {"prompt": "q", "completion": "<think>\nbecause\n</think>\n\nfour"}
    found = tokenize([record, {"prompt": "q", "completion": " four "}], own)
    assert found.changed_turns == 1
