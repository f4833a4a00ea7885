"""Nothing of the data is lost or learned without a word: ends of turns, nulls, columns, weights, rows, long texts."""

from __future__ import annotations

import copy
import json

import pyarrow
import pytest
import tiny
from pyarrow import parquet

from qlora.data.records import Gathered, read_records
from qlora.data.tokenize import tokenize
from qlora.errors import UserError

CALLS = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def templated(template: str):
    own = tiny.tokenizer()
    own.chat_template = template
    return own


def learned(dataset, tokenizer) -> list[str]:
    """The target tokens of each example as text."""
    masked = (zip(e.input_ids, e.loss_mask, strict=True) for e in dataset.examples)
    return [tokenizer.decode([token for token, counts in example if counts]) for example in masked]


def lines(folder, *records, name="a.jsonl"):
    (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return read_records(str(folder / name))


def problems(*arguments, **options):
    with pytest.raises(UserError) as caught:
        tokenize(*arguments, **options)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------------- the end of a turn
@pytest.mark.parametrize("answer", ["done <issue_closed>", "<issue_closed><|im_end|>", "a<|im_end|>\n", "<|im_start|>"])
def test_an_answer_may_close_with_control_tokens_of_its_own(tokenizer, answer):
    found = tokenize([{"prompt": "q", "completion": answer}], tokenizer)
    assert learned(found, tokenizer) == [answer + "<|im_end|>"] and found.learned_ends == 1


def test_an_empty_special_token_marks_nothing():
    own = tiny.tokenizer()
    own.bos_token = ""
    assert learned(tokenize([{"prompt": "q", "completion": "x"}], own), own) == ["x<|im_end|>"]
    own.chat_template = None
    assert learned(tokenize([{"prompt": "q", "completion": "x"}], own), own) == ["x<|im_end|>"]


def test_an_end_of_turn_that_was_added_and_not_declared_special():
    own = templated(tiny.TEMPLATE.replace("<|im_end|>", "<|done|>"))
    own.add_tokens(["<|done|>"])
    found = tokenize([{"prompt": "q", "completion": "x"}], own)
    assert learned(found, own) == ["x<|done|>"] and found.learned_ends == 1


# ---------------------------------------------------------------------------------------------------------- tool calls
def call(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_parquet_says_what_json_lines_say(tmp_path):
    own = templated(CALLS)
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
        for name in ("city", "n")
    ]
    talks = [
        [{"role": "user", "content": "q"}, call(arguments), {"role": "tool", "content": "22"}]
        for arguments in ({"city": "Rome"}, {"n": 3}, {"only": ["x", None]})
    ]
    records = [{"messages": talk, "tools": tools} for talk in talks]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    written = tokenize(lines(tmp_path, *records), own).examples
    assert tokenize(read_records(str(tmp_path / "a.parquet")), own).examples == written
    assert 'f {"city": "Rome"}' in own.decode(written[0].input_ids)


def test_nulls_that_somebody_wrote_stay(tmp_path):
    own = templated(CALLS)
    (record,) = lines(tmp_path, {"messages": [{"role": "user", "content": "q"}, call({"a": None, "b": [None]})]})
    assert learned(tokenize([record], own), own) == ['f {"a": null, "b": [null]}<|im_end|>']


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (CALLS, '{"city": "Rome"}'),
        (CALLS.replace("{{ c.function.arguments | tojson }}", "{{ 'x' + c.function.arguments }}"), 'x{"city": "Rome"}'),
        (CALLS.replace("arguments | tojson", "arguments"), '{"city": "Rome"}'),
    ],
    ids=["object", "refuses an object", "prints what it gets"],
)
def test_arguments_are_what_the_template_needs(template, written):
    own = templated(template)
    for arguments in ({"city": "Rome"}, '{"city": "Rome"}'):
        talk = [{"role": "user", "content": "q"}, call(arguments)]
        assert learned(tokenize([{"messages": talk}], own), own) == [f"f {written}<|im_end|>"]


def test_what_is_wrong_with_a_call_is_one_line():
    own, question = templated(CALLS), {"role": "user", "content": "q"}
    for bad, said in [
        (call("{Rome"), "turn 2: the `arguments` of a tool call are text that is no JSON"),
        (call([1]), "turn 2: the `arguments` of a tool call are a list"),
        (call("[1]"), "turn 2: the `arguments` of a tool call are a list"),
        ({"role": "assistant", "content": "", "tool_calls": "f"}, "turn 2: `tool_calls` is not a list of objects"),
        ({"role": "assistant", "content": "", "tool_calls": [3]}, "turn 2: `tool_calls` is not a list of objects"),
        (call({"x": "\ud83d"}), "it holds half a surrogate pair"),
    ]:
        (line,) = problems([{"messages": [question, bad]}], own)
        assert said in line
    (line,) = problems([{"messages": [question, call({"a": 1})]}], tiny.tokenizer())
    assert "does not write its `tool_calls`" in line


# ------------------------------------------------------------------------------------------------- what is not used
def test_what_nobody_reads_is_named():
    own = templated(CALLS)
    choices = {"question": "2+2?", "choices": ["3", "4"], "answer": "1", "id": "", "history": None}
    assert tokenize([choices], own).unused == ["choices"]
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm", "name": None}
    record = {"messages": [{"role": "user", "content": "q"}, thought], "tools": [{"name": "f"}]}
    assert tokenize([record], own).unused == ["reasoning_content"]
    assert tokenize([record], tiny.tokenizer()).unused == ["reasoning_content", "tools"]
    shared = {"conversations": [{"from": "human", "value": "q", "lang": "en"}, {"from": "gpt", "value": "a"}]}
    assert tokenize([shared], own).unused == ["lang"]


@pytest.mark.parametrize(
    "keys", [("messages", "role", "content", "user", "assistant"), ("conversations", "from", "value", "human", "gpt")]
)
def test_a_turn_of_weight_0_is_not_learned(keys):
    column, role, text, user, assistant = keys
    own = tiny.tokenizer()
    turns = [(user, "q", {}), (assistant, "bad", {"weight": 0}), (user, "q", {}), (assistant, "good", {"weight": 1})]
    record = {"system": "s", column: [{role: who, text: what, **more} for who, what, more in turns]}
    found = tokenize([record], own)
    assert learned(found, own) == ["good<|im_end|>"] and (found.muted_turns, found.skipped_turns) == (1, 0)
    assert "weight 0, and `train_on_prompt`" in problems([record], own, train_on_prompt=True)[0]
    record[column][1]["weight"] = 0.5
    assert "turn 2 has weight=0.5. Write 1, or 0" in problems([record], own)[0]
    record[column][1]["weight"] = record[column][3]["weight"] = 0
    assert tokenize([record, {column: [turn | {"weight": 1} for turn in record[column]]}], own).dropped == 1


def test_empty_rows_are_passed_over_and_empty_answers_counted(tmp_path):
    own = tiny.tokenizer()
    found = tokenize(lines(tmp_path, "prompt,completion", "q,a", ",", ' ," "', "q,", name="a.csv"), own)
    assert (len(found.examples), found.empty, found.empty_answers) == (2, 2, 1)
    assert [example.place[1] for example in found.examples] == ["line 2", "line 5"]
    assert "none of its 2 records holds a value" in problems([{"prompt": "", "completion": None}, {}], own)[0]


# --------------------------------------------------------------------------------------------------- size
@pytest.mark.parametrize(
    "text", ["one two, three. " * 4000, "a" * 40_000, "\u6771\u4eac " * 9000, "x" + " \n" * 20_000]
)
def test_a_long_text_is_cut_before_it_is_tokenized_and_keeps_its_tokens(tokenizer, text):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for record, own in (({"text": text}, bare), ({"prompt": "q", "completion": text}, tokenizer)):
        whole = tokenize([record], own, max_tokens=10**6).examples[0]
        found = tokenize([record, {**record, **dict.fromkeys(record, "b")}], own, max_tokens=64)
        assert found.examples[0].input_ids == whole.input_ids[:64] and found.truncated == 1
        assert found.examples[0].loss_mask == whole.loss_mask[:64] and (found.ends, found.learned_ends) == (2, 1)
        assert len(tokenize([record, dict.fromkeys(record, "b")], own, max_tokens=64, truncate="drop").examples) == 1


def test_ten_megabytes_in_a_line_cost_what_is_kept(tokenizer):
    records = [{"prompt": "q", "completion": "a" * 10**7}, {"prompt": "q", "completion": "a"}]
    assert tokenize(records, tokenizer, max_tokens=64).truncated == 1


def test_only_the_problems_that_are_shown_are_written():
    class Told(str):
        count = 0

        def __str__(self) -> str:
            Told.count += 1
            return "x"

    gathered = Gathered()
    for _ in range(1000):
        gathered.add("data", Told(), "is wrong", "Mend it")
    assert Told.count <= 20
    with pytest.raises(UserError) as caught:
        gathered.refuse()
    assert len(caught.value.problems) == 11 and "and 990 more" in caught.value.problems[10]


def test_many_columns_make_a_short_line():
    (line,) = problems([dict.fromkeys((f"column {number}" for number in range(100_000)), "x")], tiny.tokenizer())
    assert len(line) < 1000 and "and 99980 more" in line
    (line,) = problems([{"Question": "a", "Answer ": "b"}], tiny.tokenizer())
    assert "fit question-answer but for their spelling. Rename Question to question and Answer  to answer" in line
