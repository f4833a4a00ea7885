"""Numbers that cannot be: tokens beyond the embedding and examples beyond the positions, said before a model loads."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from ggufs import write_gguf
from runs import refused

from qlora import UserError, load_base, load_tokenizer
from qlora.config.commands import EvalConfig, PlanConfig
from qlora.data.batch import Example
from qlora.evaluate import evaluate
from qlora.generate import generate_batch
from qlora.models.limits import Limits, config_limits, source_limits
from qlora.models.source import resolve
from qlora.run.commands import evaluate_command, plan_command
from qlora.run.recipe import finetune

LONG = {"question": "why?", "answer": "because " * 20}


def lines(function, *args) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args)
    return caught.value.problems


@pytest.fixture(params=["gpt2", "llama"])
def short(request, tmp_path):
    """A model of 64 positions, absolute or rotary, and data with an example of more."""
    config = tiny.CONFIGS[request.param]()
    config.max_position_embeddings = 64
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "1", "answer": "2"}) + "\n" + json.dumps(LONG) + "\n")
    return {"model": str(tmp_path / "short"), "data": str(tmp_path / "long.jsonl")}


def test_more_tokens_than_positions(short, config):
    given = short | {"device": "cpu"}
    for found in (
        refused(config(**short, eval_data=short["data"])),
        lines(plan_command, PlanConfig(**given)),
        lines(evaluate_command, EvalConfig(**given)),
    ):
        assert all("and the model 64 positions. Use `max_tokens=64`" in line for line in found) and found
    assert refused(config(**short, eval_data=short["data"]))[1].startswith("eval_data=")
    (line,) = lines(plan_command, PlanConfig(model=short["model"], device="cpu"))
    assert line == "max_tokens=1024: the model has 64 positions. Use `max_tokens=64`."


def test_as_many_tokens_as_positions(short, config):
    assert finetune(config(**short, max_tokens=64, steps=1)).steps == 1


def test_tokens_beyond_the_embedding(config, place, tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    added = tiny.tokenizer()
    added.add_tokens([f"<{i}>" for i in range(70)])  # 328 for an embedding of 320 rows
    added.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text(
        json.dumps({"question": "1", "answer": "2"}) + "\n" + json.dumps({"question": "1", "answer": "<69>"})
    )
    given = {"model": str(folder), "data": str(data), "device": "cpu"}
    for found in (
        refused(config(model=str(folder), data=str(data))),
        lines(plan_command, PlanConfig(**given)),
        lines(evaluate_command, EvalConfig(**given)),
        lines(lambda: generate_batch(load_base(str(folder)), load_tokenizer(str(folder)), ["<69>"], max_new_tokens=1)),
    ):
        (line,) = found
        assert "holds the token '<69>' with number 327, and the model's embedding has 320 rows" in line
    data.write_text(json.dumps({"question": "1", "answer": "<61>"}))
    assert finetune(config("fits", model=str(folder), data=str(data), steps=1)).steps == 1


def test_scaled_positions_count_as_scaled(tmp_path):
    def positions(**rope) -> int | None:
        config = transformers.LlamaConfig(
            max_position_embeddings=2048, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | rope
        )
        return config_limits(config).positions

    assert positions() == 2048
    assert positions(rope_type="linear", factor=4.0) == 8192
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024) == 4096
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=512) == 2048
    assert config_limits(tiny.MORE["bloom"]()).positions is None
    path = write_gguf(tmp_path / "model.gguf", tiny.llama())
    assert source_limits(resolve(str(path))) == Limits(320, 2048)


def test_evaluate_from_python_says_what_does_not_fit():
    outside = Example((1, 2, 400), (False, True, True))
    with pytest.raises(UserError, match=r"example 2: holds the token with number 400, and .* has 320 rows"):
        evaluate(tiny.llama(), [Example((1, 2), (False, True)), outside])
