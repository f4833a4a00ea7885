"""finetune from end to end on a tiny model: its files, its numbers, its adapter."""

from __future__ import annotations

import dataclasses
import json

import huggingface_hub
import pytest
import torch
from runs import metrics, refused

from qlora.config.commands import EvalConfig, FinetuneConfig, PlanConfig
from qlora.config.options import from_yaml
from qlora.layers.attach import named_adapters
from qlora.run.adapted import load_adapted
from qlora.run.commands import evaluate_command, plan_command
from qlora.run.recipe import finetune
from qlora_kernels import backends


def test_a_run(config, tmp_path, capsys):
    chosen = config(eval_fraction=0.25, eval_every=2, save_every=2, steps=12)
    result = finetune(chosen)
    output = tmp_path / "run"
    assert {path.name for path in output.iterdir()} == {"adapter", "checkpoints", "config.yaml", "metrics.jsonl"}
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in (2, 4, 6, 8, 10, 12)
    ]
    assert from_yaml(FinetuneConfig, output / "config.yaml") == chosen
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6, 8, 10, 12]
    assert (result.steps, result.loss, result.adapter) == (12, lines[-1]["loss"], output / "adapter")
    assert (result.eval_loss_before, result.eval_loss_after) == (lines[0]["eval_loss"], lines[-1]["eval_loss"])
    assert result.eval_loss_after < result.eval_loss_before - 0.2
    assert result.tokens == sum(line["tokens"] for line in lines)
    notes = json.loads((output / "adapter/qlora.json").read_text())["notes"]
    assert notes["eval_loss_after"] == result.eval_loss_after and notes["steps"] == 12 and notes["examples"] == 18
    said = capsys.readouterr()
    parameters = sum(
        p.numel()
        for _, adapter in named_adapters(load_adapted(output / "adapter")[0])
        for p in adapter.parameters(recurse=False)
    )
    for words in (
        "18 examples, 6 held out",
        f"dora of rank 4 on 14 layers, {parameters:,} trainable",
        "NF4 in blocks of 64",
        "12 of 2 examples, packed without padding",
    ):
        assert words in said.out
    assert (
        f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after" in said.out
        and str(result.adapter) in said.out
    )
    assert "step 12/12" in said.err


def test_auto_for_want_of_bf16_allows_float32_products_by_integers(config, monkeypatch):
    """While it starts adapters and trains, and where nobody asked for fp32."""
    allowed, allow = [], torch.set_float32_matmul_precision
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)

    def note(name: str) -> None:
        if name != torch.get_float32_matmul_precision():
            allowed.append(name)
        allow(name)

    monkeypatch.setattr(torch, "set_float32_matmul_precision", note)
    for dtype, expected in (("auto", ["high", "highest"]), ("fp32", [])):
        allowed.clear()
        finetune(config(dtype, dtype=dtype, steps=1, adapter_init="error"))
        assert allowed == 2 * expected


def test_the_commands_compute_as_the_run_did(config, place, monkeypatch):
    """Where `auto` makes float32 products of integers: the same loss to the bit, and float32 for who asks."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    held_out = str(place / "held.jsonl")
    result = finetune(config(dtype="auto", eval_data=held_out))
    asked = EvalConfig(adapter=str(result.adapter), data=held_out, device="cpu", batch_size=config().batch_size)
    assert evaluate_command(asked)["loss"] == result.eval_loss_after
    exact = evaluate_command(dataclasses.replace(asked, dtype="fp32"))["loss"]
    assert (exact != result.eval_loss_after) == backends.multiplies_by_integers()


def test_a_run_by_integers_does_not_go_on_without(config, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    finetune(config(dtype="auto", save_every=2))
    if backends.multiplies_by_integers():
        (problem,) = refused(config(dtype="fp32", resume=True))
        assert problem.startswith("dtype=fp32: the run began with dtype=auto (fp32, products by integers)")
    else:
        assert finetune(config(dtype="fp32", resume=True)).steps == 4
    assert finetune(config(dtype="auto", resume=True)).steps == 4


def test_the_adapter_is_the_last_checkpoint_and_evaluates_to_the_last_loss(config, place, tmp_path):
    result = finetune(config(eval_data=str(place / "held.jsonl")))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (result.adapter / name).read_bytes() == (tmp_path / "run/checkpoints/step-000004" / name).read_bytes()
    asked = EvalConfig(adapter=str(result.adapter), data=str(place / "held.jsonl"), device="cpu", max_tokens=36)
    assert evaluate_command(asked)["notes"]
    found = evaluate_command(EvalConfig(adapter=str(result.adapter), data=str(place / "held.jsonl"), device="cpu"))
    assert found["notes"] == []
    assert found["loss"] == pytest.approx(result.eval_loss_after, rel=1e-6)
    assert found["examples"] == 8 and found["adapter"] == str(result.adapter)
    bare = evaluate_command(
        EvalConfig(model=str(place / "model"), data=str(place / "held.jsonl"), device="cpu", dtype="fp32")
    )
    assert bare["loss"] == pytest.approx(result.eval_loss_before, rel=1e-6)


def test_the_first_step_is_the_definition(config, place, tmp_path):
    """Loss and learning of one step, computed again from the parts: the recipe wires them as it says."""
    from qlora.data.batch import pack
    from qlora.data.order import step_indices
    from qlora.data.records import read_records
    from qlora.data.tokenize import tokenize
    from qlora.layers.loss import loss_sum
    from qlora.models.load import load_base
    from qlora.models.source import load_tokenizer

    finetune(config(steps=1, batch_size=2, accumulate=3, seed=5))
    data = tokenize(read_records(str(place / "data.jsonl")), load_tokenizer(str(place / "model")))
    batch = pack([data.examples[i] for i in step_indices(len(data.examples), 6, 5, 0)])
    model = load_base(str(place / "model"), dtype="fp32", device="cpu")
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx((loss_sum(model, batch) / batch.target_tokens).item(), rel=1e-5)
    assert line["tokens"] == batch.tokens and line["learning_rate"] == 1e-2


def test_epochs(config, tmp_path):
    """24 examples in steps of 5: 4 whole steps and a short one, each example once."""
    finetune(config(epochs=1, batch_size=5))
    once = metrics(tmp_path / "run")
    finetune(config("whole", steps=1, batch_size=24))
    assert len(once) == 5 and sum(line["tokens"] for line in once) == metrics(tmp_path / "whole")[0]["tokens"]
    finetune(config("half", epochs=0.5, batch_size=5))
    assert len(metrics(tmp_path / "half")) == 3
    assert "epochs=0.5 are only 3 steps" in refused(config("short", epochs=0.5, batch_size=5, warmup=4))[0]


@pytest.mark.parametrize("command", ["finetune", "finetune --memory", "plan", "plan --data"])
def test_the_hub_is_asked_once(config, place, monkeypatch, command):
    """At the border to the network: a command finds its model once, whatever it does with it."""
    asked = []

    def download(name: str, **options) -> str:
        asked.append(name)
        return str(place / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = config(model="somebody/tiny", steps=1, memory=8_000_000_000 if "--memory" in command else None)
    if command.startswith("finetune"):
        finetune(options)
    else:
        given = dataclasses.asdict(options) | {"epochs": None, "output": None}
        plan_command(PlanConfig(**given | ({} if "--data" in command else {"data": None})))
    assert asked == ["somebody/tiny"]
