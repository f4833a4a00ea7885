"""What a run says of its data before it begins, and that it goes on with the same data on another day."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import tiny
from runs import refused, same_files
from transformers import AutoTokenizer

from qlora.run.recipe import finetune


def test_what_becomes_of_training_and_held_out_data_is_said(config, tmp_path, capsys):
    records = [{"prompt": "q", "completion": "a", "source": "web"}, {"prompt": "q", "completion": "a" * 90}]
    records += [{"prompt": "", "completion": ""}, {"prompt": "p" * 90, "completion": "a"}]
    for name, times in (("train.jsonl", 1), ("held.jsonl", 2)):
        (tmp_path / name).write_text("\n".join(json.dumps(record) for record in records * times))
    data, held = str(tmp_path / "train.jsonl"), str(tmp_path / "held.jsonl")
    finetune(config(data=data, eval_data=held, max_tokens=60, steps=1))
    said = capsys.readouterr().out
    for words in (
        "2 examples, 4 held out",
        "1 cut to 60 tokens",
        "1 dropped",
        "1 empty records passed over",
        "not used: source",
        "held out: 2 cut to 60 tokens",
        "held out: 2 dropped",
        "4 held-out examples are in the training data too",
        "example  <|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n⟦a<|im_end|>⟧\\n",
    ):
        assert words in said


def test_a_run_whose_template_writes_the_date_is_resumed_on_another_day(config, place, tmp_path, monkeypatch):
    model = shutil.copytree(place / "model", tmp_path / "model")
    own = AutoTokenizer.from_pretrained(model)
    own.chat_template = "{{ strftime_now('%d %b %Y') }}" + tiny.TEMPLATE
    own.save_pretrained(model)

    class NewYear(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2024, 1, 1)

    usual = {"model": str(model), "schedule": "constant"}
    with monkeypatch.context() as patched:
        patched.setattr("qlora.run.inputs.datetime", NewYear)
        finetune(config("long", steps=4, **usual))
        finetune(config("short", steps=2, **usual))
    finetune(config("short", steps=4, resume=True, **usual))  # today
    same_files(tmp_path / "long/checkpoints/step-000004", tmp_path / "short/checkpoints/step-000004")
    other = tiny.write_data(tmp_path / "other.jsonl", seed=3)
    assert refused(config("short", steps=4, resume=True, **usual | {"data": str(other)}))[0].startswith(
        "data=(changed)"
    )
