"""Tokens and loss masks with SmolLM2's real tokenizer, held against transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qlora.config.shared import FORMATS
from qlora.data.chat import prompt_ids
from qlora.data.formats import COLUMNS, pick_format
from qlora.data.records import read_records
from qlora.data.tokenize import mask_by_offsets, tokenize
from qlora.errors import UserError

ROOT = Path(__file__).parents[2]
GENERATION = r"""{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TALKS = [
    [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 😀 naïve 東京"},
        {"role": "assistant", "content": " Hello, 世界! 😀😀\n\n"},
        {"role": "user", "content": "assistant\nHello, 世界!"},
        {"role": "assistant", "content": "<|im_start|>code:\n  x = 1\t\n"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


@pytest.fixture(scope="module")
def base_tokenizer(tokenizer):
    """The same tokenizer as a base model has it: without a chat template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    return own


def targets(example, tokenizer):
    """The target tokens as text, a "|" between stretches."""
    text, previous = "", False
    for token, target in zip(example.input_ids, example.loss_mask, strict=True):
        text += ("" if previous or not text or not target else "|") + (tokenizer.decode([token]) if target else "")
        previous = target
    return text


def problems(records, tokenizer, **options):
    with pytest.raises(UserError) as caught:
        tokenize(records, tokenizer, **options)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------------- tokens and masks
@pytest.mark.parametrize("talk", TALKS)
def test_ids_equal_apply_chat_template_token_for_token(tokenizer, talk):
    (example,) = tokenize([{"messages": talk}], tokenizer).examples
    assert list(example.input_ids) == tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"]


@pytest.mark.parametrize("talk", TALKS)
def test_masks_equal_the_generation_masks_of_transformers(tokenizer, talk):
    oracle = copy.deepcopy(tokenizer)
    oracle.chat_template = GENERATION
    expected = oracle.apply_chat_template(talk, return_assistant_tokens_mask=True)
    (example,) = tokenize([{"messages": talk}], oracle).examples
    assert list(example.input_ids) == expected["input_ids"]
    assert [int(target) for target in example.loss_mask] == expected["assistant_masks"]


def test_masks_do_not_depend_on_the_offsets_of_white_space(tokenizer):
    trimming = copy.deepcopy(tokenizer)  # as Llama 3's
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spaced = [{"role": "user", "content": "a  "}, {"role": "assistant", "content": "b   b  \n\n  c   "}]
    records = [{"messages": talk} for talk in (*TALKS, spaced)]
    offsets = trimming("a   b", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    assert tokenize(records, trimming).examples == tokenize(records, tokenizer).examples


def test_masks_with_a_sentencepiece_tokenizer():
    """As Llama 2's: white space is part of the tokens, and the answer begins with it."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "[", "I", "N", "S", "T", "]", "/", "a", "b", "\u2581b", "\u2581[", "\n"]
    backend = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("\u2581", "b"), ("\u2581", "[")],
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    own = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    own.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    (example,) = tokenize(
        [
            {
                "messages": [
                    {"role": role, "content": text}
                    for role, text in (("user", "a"), ("assistant", "b\nb"), ("user", "b"), ("assistant", "a"))
                ]
            }
        ],
        own,
    ).examples
    shown = own.convert_ids_to_tokens(example.input_ids)
    tokens = [token if target else "-" for token, target in zip(shown, example.loss_mask, strict=True)]
    assert " ".join(tokens).replace("- ", "") == "\u2581b \n b \u2581 </s> \u2581 a \u2581 </s>"


def test_masks_are_the_answers_and_their_end_of_turn(tokenizer):
    dataset = tokenize([{"messages": talk} for talk in TALKS], tokenizer)
    assert targets(dataset.examples[0], tokenizer) == "Paris.<|im_end|>"
    second = dataset.examples[1]
    chosen = [token for token, target in zip(second.input_ids, second.loss_mask, strict=True) if target]
    assert tokenizer.decode(chosen) == " Hello, 世界! 😀😀\n\n<|im_end|><|im_start|>code:\n  x = 1\t\n<|im_end|>"
    assert targets(dataset.examples[2], tokenizer) == "<|im_end|>"  # an empty answer is an answer
    assert targets(dataset.examples[3], tokenizer) == "b<|im_end|>"
    assert dataset.tokens == sum(len(example.input_ids) for example in dataset.examples)
    assert dataset.target_tokens == sum(sum(example.loss_mask) for example in dataset.examples)
    assert (dataset.format, dataset.truncated, dataset.dropped, dataset.skipped_turns) == ("chat", 0, 0, 0)


SAME = {
    "chat": {"messages": [{"role": "user", "content": "Q\n\nC"}, {"role": "assistant", "content": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q\n\nC"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "C", "output": "A", "answer": "ignored"},
    "prompt-completion": {"prompt": "Q\n\nC", "completion": "A"},
    "question-answer": {"question": "Q\n\nC", "answer": "A"},
}


@pytest.mark.parametrize("format", SAME)
def test_formats_are_told_apart_and_say_the_same(tokenizer, format):
    dataset = tokenize([SAME[format]], tokenizer)
    assert dataset.format == format == tokenize([SAME[format]], tokenizer, format=format).format
    assert dataset.examples == tokenize([SAME["chat"]], tokenizer).examples
    assert targets(dataset.examples[0], tokenizer) == "A<|im_end|>"
    with_system = tokenize([{**SAME[format], "system": "S"}], tokenizer).examples[0]
    assert tokenizer.decode(with_system.input_ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ")


def test_the_formats_of_the_options_are_the_formats_there_are():
    assert set(FORMATS) == set(COLUMNS)


@pytest.mark.parametrize("context", [{}, {"input": ""}, {"input": None}])
def test_alpaca_without_input(tokenizer, context):
    (example,) = tokenize([{"instruction": "Q", "output": "A", **context}], tokenizer).examples
    assert "<|im_start|>user\nQ<|im_end|>" in tokenizer.decode(example.input_ids)


def test_text_learns_every_token_and_eos(tokenizer, base_tokenizer):
    for own in (tokenizer, base_tokenizer):  # a chat template has no part in plain text
        (example,) = tokenize([{"text": "Once upon a time"}], own).examples
        assert own.decode(example.input_ids) == "Once upon a time<|im_end|>"
        assert example.loss_mask == (False,) + (True,) * (len(example.input_ids) - 1)
    assert tokenize([{"text": "a<|im_end|>"}], tokenizer).examples == tokenize([{"text": "a"}], tokenizer).examples
    assert tokenize([{"text": ""}, {"text": "a"}], tokenizer).empty == 1


def test_train_on_prompt_learns_everything_but_the_first_token(tokenizer):
    (example,) = tokenize([{"messages": TALKS[1]}], tokenizer, train_on_prompt=True).examples
    assert list(example.input_ids) == tokenizer.apply_chat_template(TALKS[1])["input_ids"]
    assert example.loss_mask == (False,) + (True,) * (len(example.input_ids) - 1)


def test_a_base_model_sees_the_plain_prompt_and_learns_answer_and_eos(base_tokenizer):
    for format in ("alpaca", "prompt-completion", "question-answer"):
        (example,) = tokenize([SAME[format]], base_tokenizer).examples
        assert base_tokenizer.decode(example.input_ids) == "### Instruction:\nQ\n\nC\n\n### Response:\nA<|im_end|>"
        assert targets(example, base_tokenizer) == "A<|im_end|>"
        before = prompt_ids("Q\n\nC", base_tokenizer)
        assert list(example.input_ids[: len(before)]) == before and not any(example.loss_mask[: len(before)])


@pytest.mark.parametrize("format", ["chat", "sharegpt"])
def test_conversations_need_a_chat_template(base_tokenizer, format):
    (found,) = problems([SAME[format]], base_tokenizer)
    assert "conversations need a chat template" in found and "prompt and completion" in found


def test_bos_and_eos_are_written_once_whoever_writes_them(tokenizer, base_tokenizer):
    """A tokenizer that adds both by itself, as Llama's adds BOS, and a template that writes its own BOS."""

    def adding(own):
        own = copy.deepcopy(own)
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
        return own

    chat, plain = adding(tokenizer), adding(base_tokenizer)
    assert tokenize([SAME["chat"]], chat).examples == tokenize([SAME["chat"]], tokenizer).examples
    assert prompt_ids("Q", chat) == prompt_ids("Q", tokenizer)
    (example,) = tokenize([SAME["alpaca"]], plain).examples
    assert plain.decode(example.input_ids) == "<|im_start|>### Instruction:\nQ\n\nC\n\n### Response:\nA<|im_end|>"
    assert targets(example, plain) == "A<|im_end|>"
    assert list(example.input_ids[:-2]) == prompt_ids("Q\n\nC", plain)
    for text in ("a", "<|im_start|>a", "<|im_start|>a<|im_end|>"):
        assert plain.decode(tokenize([{"text": text}], plain).examples[0].input_ids) == "<|im_start|>a<|im_end|>"
        assert plain.decode(prompt_ids(text.removesuffix("<|im_end|>"), plain, raw=True)) == "<|im_start|>a"


def test_a_tokenizer_in_python_is_masked_by_prefixes():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    (example,) = tokenize([SAME["alpaca"]], slow).examples
    assert slow.decode(example.input_ids) == "### Instruction:\nQ\n\nC\n\n### Response:\nA</s>"
    assert targets(example, slow) == "A</s>"
    slow.chat_template = GENERATION
    (example,) = tokenize([{"messages": TALKS[0]}], slow).examples  # its end token is plain text here, so EOS follows
    assert targets(example, slow) == "Paris.<|im_end|>\n</s>"

    class Joining(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.replace("\nA", "A"))

    (found,) = problems([SAME["alpaca"]], Joining())
    assert "joins prompt and answer of record 1 in one token" in found


def test_masks_with_offsets_as_tokenizers_give_them():
    ids, special = [7, 1, 8, 9, 2], {1, 2}
    swallowing = [(0, 1), (1, 5), (5, 7), (7, 8), (8, 11)]  # token 1 took the white space at 4, the answer begins there
    assert mask_by_offsets(ids, [(4, 11)], swallowing, special) == [False, False, True, True, True]
    straddling = [(0, 1), (1, 4), (3, 7), (7, 8), (8, 11)]  # 8 holds the last of the prompt and the first of the answer
    assert mask_by_offsets(ids, [(4, 11)], straddling, special) == [False, False, True, True, True]
    trimmed = [(0, 1), (1, 4), (6, 6), (6, 8), (8, 11)]  # white space at 4:6 was given no width
    assert mask_by_offsets(ids, [(4, 11)], trimmed, special) == [False, False, True, True, True]
    assert mask_by_offsets(ids, [(0, 1), (7, 8)], straddling, special) == [True, False, False, True, False]
    pieces = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]  # one character of three tokens
    assert mask_by_offsets(ids, [(1, 2)], pieces, special) == [False, True, True, True, False]


def test_tools_and_tool_calls_are_the_templates_business(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or (m.tool_calls | tojson) }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = [{"function": {"name": "add", "arguments": {"a": 2, "b": 1.50}}}]
    talk = [
        {"role": "user", "content": "2+1.5?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": 3.5},
        {"role": "assistant", "content": "3.5"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]

    def read(tools):
        return lines(json.dumps({"messages": talk, "tools": tools}).replace('"content": 3.5', '"content": 3.50'))

    (example,) = tokenize(read(tools), own).examples
    whole = own.decode(example.input_ids)
    assert whole.startswith('<|im_start|>tools [{"type": "function", "function": {"name": "add"}}]<|im_end|>')
    assert "<|im_start|>tool\n3.50<|im_end|>" in whole
    assert targets(example, own) == f"{json.dumps(call)}<|im_end|>|3.5<|im_end|>"
    assert tokenize(read(json.dumps(tools)), own).examples == [example]  # `tools` may be JSON text


def lines(*texts):
    """Records as the JSONL reader gives them."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(texts))
        file.flush()
        return read_records(file.name)


# ------------------------------------------------------------------------------------------------------------- lengths
def test_what_is_too_long_loses_its_end_or_is_dropped_and_is_counted(tokenizer):
    records = [{"prompt": "a", "completion": "b " * size} for size in (1, 20, 40)]
    lengths = [len(example.input_ids) for example in tokenize(records, tokenizer).examples]
    cut = tokenize(records, tokenizer, max_tokens=lengths[1])
    assert [len(example.input_ids) for example in cut.examples] == [lengths[0], lengths[1], lengths[1]]
    assert (cut.truncated, cut.dropped) == (1, 0)
    assert cut.examples[2].input_ids == tokenize(records, tokenizer).examples[2].input_ids[: lengths[1]]
    assert cut.target_tokens == sum(sum(example.loss_mask) for example in cut.examples)
    dropped = tokenize(records, tokenizer, max_tokens=lengths[1], truncate="drop")
    assert (len(dropped.examples), dropped.truncated, dropped.dropped) == (2, 0, 1)
    long_prompt = tokenize([*records, {"prompt": "a " * 200, "completion": "b"}], tokenizer, max_tokens=100)
    assert (len(long_prompt.examples), long_prompt.truncated, long_prompt.dropped) == (3, 0, 1)  # no target left


def test_nothing_left_is_an_error_that_says_how_long(tokenizer):
    records = [{"prompt": "a " * 200, "completion": "b"}]
    length = len(tokenize(records, tokenizer).examples[0].input_ids)
    (found,) = problems(records, tokenizer, max_tokens=50)
    assert found.startswith("max_tokens=50: no example") and f"Raise it to {length}" in found
    assert "Raise it" in problems(records, tokenizer, max_tokens=length - 1, truncate="drop")[0]


# -------------------------------------------------------------------------------------------------------------- errors
def test_columns_that_fit_no_format_or_two(tokenizer):
    (found,) = problems([{"questions": "a", "answer": "b"}], tokenizer)
    assert "the columns are answer, questions, which fit no format" in found
    assert "question-answer needs question and answer; text needs text" in found
    both = [{"question": "a", "answer": "b", "messages": TALKS[0]}]
    (found,) = problems(both, tokenizer)
    assert "fit chat and question-answer. Say which, for example `format=chat`" in found
    assert tokenize(both, tokenizer, format="question-answer").format == "question-answer"
    (found,) = problems(both, tokenizer, format="alpaca")
    assert found.startswith("format=alpaca: needs the columns instruction and output, and the columns are answer, mess")
    assert "must be one of chat" in problems(both, tokenizer, format="alpacca")[0]
    assert pick_format([{"text": "a"}, {"text": "b", "question": "c", "answer": "d"}]) == "text"  # all have it


def test_every_record_that_does_not_fit_is_named(tokenizer):
    records = lines(
        '{"prompt": "a", "completion": "b"}',
        '{"prompt": "a"}',
        '{"prompt": null, "completion": ["b"]}',
        "",
        '{"prompt": {"x": 1}, "completion": "\\ud83d"}',
        '{"prompt": 7, "completion": 1.50}',
    )
    found = [line.split(": ", 1)[1] for line in problems(records, tokenizer)]
    assert [line.split(". ")[0] for line in found] == [
        "line 2: `completion` is missing, where text is needed",
        "line 3: `prompt` is null, where text is needed",
        "line 3: `completion` is a list, where text is needed",
        "line 5: `prompt` is an object, where text is needed",
        "line 5: `completion` holds half a surrogate pair",
    ]
    good = tokenize([records[0], records[-1]], tokenizer).examples[1]
    assert targets(good, tokenizer) == "1.50<|im_end|>"
    many = problems([{"text": ["a"]}] * 30, tokenizer)
    assert len(many) == 11 and "record 10" in many[9] and "and 20 more" in many[10]
    (found,) = problems([{"text": 0.5}], tokenizer)  # from Parquet: 0.5, .5 or 0.50?
    assert "record 1: `text` is a float, which has no text of its own" in found


def test_turns_that_are_none(tokenizer):
    def of(turns, **options):
        return [line.split(": ", 1)[1].split(". ")[0] for line in problems([{"messages": turns}], tokenizer, **options)]

    assert of("hello") == ["record 1: `messages` is text, where a list of turns is needed"]
    assert of([]) == ["record 1: `messages` is an empty or mixed list, where a list of turns is needed"]
    assert of([{"role": "asistant", "content": "a"}]) == ["record 1: turn 1 has role='asistant'"]
    assert of([{"from": "human", "value": "a"}]) == ["record 1: turn 1 has role=None"]
    assert of([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]) == [
        "record 1: turn 2: `content` is null, where text is needed"
    ]
    assert of([{"role": "user", "content": "a"}]) == ["record 1: no assistant turn, so there is nothing to learn"]
    twice = {"messages": [{"role": "system", "content": "a"}, *TALKS[0]], "system": "b"}
    assert "and a column `system` too" in problems([twice], tokenizer)[0]
    assert "`tools` is not JSON" in problems([{"messages": TALKS[0], "tools": "{"}], tokenizer)[0]
    assert "`tools` is an object" in problems([{"messages": TALKS[0], "tools": {"a": 1}}], tokenizer)[0]


def test_what_a_template_refuses_and_what_it_hides(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ raise_exception('no system here') if messages[0].role == 'system' }}" + GENERATION
    records = [{"messages": TALKS[0]}, {"messages": TALKS[1]}]
    assert "record 2: the chat template refuses it (no system here)" in problems(records, own)[0]
    own.chat_template = GENERATION.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    (found,) = problems(records[:1], own)
    assert "the answer's tokens are unknown" in found
    assert len(tokenize(records[:1], own, train_on_prompt=True).examples) == 1  # needs no mask


def test_no_records_and_no_eos(tokenizer, base_tokenizer):
    assert problems([], tokenizer) == ["data: there are no records. Give at least one."]
    endless = copy.deepcopy(base_tokenizer)
    endless.eos_token = None
    assert "no EOS token" in problems([SAME["alpaca"]], endless)[0]


# --------------------------------------------------------------------------------------------------------- tickets
def test_the_tickets_are_what_their_script_writes(tmp_path, tokenizer):
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_tickets.py"), str(tmp_path)], check=True)
    files = ("tickets_train.jsonl", "tickets_test.jsonl")
    for name in files:
        assert (tmp_path / name).read_bytes() == (ROOT / "scripts" / "data" / name).read_bytes()
    train, test = (read_records(str(tmp_path / name)) for name in files)
    assert (len(train), len(test)) == (600, 60)
    answers = [json.loads(record["completion"]) for record in train + test]
    assert all(list(answer) == ["name", "order", "product", "issue", "priority"] for answer in answers)
    for field in ("name", "order"):  # learned by copying, not by heart
        assert len({answer[field] for answer in answers}) == 660
    dataset = tokenize(train, tokenizer)
    assert 80 <= dataset.tokens / 600 <= 88 and dataset.dropped == 0
