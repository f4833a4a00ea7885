"""Going on with a run: to the bit, after an interruption, under another budget, and what stays of its checkpoints."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from runs import metrics, names, refused, same_files
from safetensors.torch import load_file

from qlora.errors import UserError
from qlora.run.recipe import finetune
from qlora.run.verify import differences
from qlora.train.signals import Interrupted


@pytest.mark.parametrize(("method", "stopped"), [("dora", 2), ("dora", 6), ("lora", 4), ("dora", 8)])
def test_resumed_is_uninterrupted_to_the_bit(config, tmp_path, method, stopped):
    """With dropout, warmup, accumulation and evaluation; the run is cut off between two checkpoints."""
    usual = {
        "method": method,
        "dropout": 0.2,
        "steps": 8,
        "warmup": 3,
        "accumulate": 2,
        "save_every": 2,
        "eval_fraction": 0.2,
        "eval_every": 3,
        "weight_decay": 0.1,
    }
    finetune(config("whole", **usual))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(
        whole, cut, ignore=shutil.ignore_patterns("adapter", *(f"step-{step:06d}" for step in range(stopped + 1, 9)))
    )
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text(
        "".join(lines[: stopped + 2]) + '{"step": 99, "lo'
    )  # the kernel wrote more than was saved
    torch.manual_seed(1234)
    result = finetune(config("cut", resume=True, **usual))
    same_files(whole / "checkpoints/step-000008", cut / "checkpoints/step-000008")
    assert (
        load_file(whole / "adapter/adapter_model.safetensors").keys()
        == load_file(result.adapter / "adapter_model.safetensors").keys()
    )
    numbers = ("step", "loss", "tokens", "learning_rate", "grad_norm", "eval_loss")
    assert [[line.get(n) for n in numbers] for line in metrics(cut)] == [
        [line.get(n) for n in numbers] for line in metrics(whole)
    ]
    assert yaml.safe_load((cut / "config.yaml").read_text())["resume"] is False


@pytest.mark.parametrize(("batch", "step"), [(1, 0), (4, 2), (6, 2), (7, 4), (8, 4)])
def test_an_evaluation_does_not_outlast_a_signal(config, tmp_path, monkeypatch, batch, step):
    """Three batches are evaluated after steps 0, 2 and 4. What a signal left out is made up for, in the same line."""
    usual = {"steps": 4, "eval_fraction": 0.25, "eval_every": 2, "dropout": 0.2}
    finetune(config("whole", **usual))
    computed, cross_entropy = [], torch.nn.functional.cross_entropy

    def counted(*arguments, **options):
        computed.append(1)
        if len(computed) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return cross_entropy(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    with pytest.raises(Interrupted) as stopped:
        finetune(config("cut", **usual))
    assert (stopped.value.step, len(computed)) == (step, batch)
    owes = step > 0 and batch % 3 > 0
    if step:
        assert metrics(tmp_path / "cut")[-1]["step"] == step
        assert (metrics(tmp_path / "cut")[-1]["eval_loss"] is None) == owes
    if owes:  # and once more, while it makes up for it
        computed[:] = [1] * (batch - 1)
        with pytest.raises(Interrupted):
            finetune(config("cut", resume=True, **usual))
        assert metrics(tmp_path / "cut")[-1]["eval_loss"] is None
    result = finetune(config("cut", resume="auto", **usual))
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    assert result.tokens == sum(line["tokens"] for line in metrics(tmp_path / "whole"))
    assert result.eval_loss_after == metrics(tmp_path / "whole")[-1]["eval_loss"]


def test_a_constant_run_can_be_made_longer(config, tmp_path):
    usual = {"schedule": "constant", "dropout": 0.1}
    finetune(config("long", steps=6, **usual))
    finetune(config("short", steps=3, **usual))
    finetune(config("short", steps=6, save_every=1, resume=True, **usual))
    same_files(tmp_path / "long/checkpoints/step-000006", tmp_path / "short/checkpoints/step-000006")
    with pytest.raises(UserError, match="steps=2: the run has taken 6 steps already"):
        finetune(config("short", steps=2, resume=True, **usual))


def test_a_run_that_ended_with_a_short_step_cannot(config):
    finetune(config(schedule="constant", epochs=1, batch_size=5))
    with pytest.raises(UserError, match="the last step of the run was a short one"):
        finetune(config(schedule="constant", epochs=2, batch_size=5, resume=True))


def test_resuming_a_finished_run_only_writes_what_is_missing(config, tmp_path):
    first = finetune(config(eval_fraction=0.2))
    shutil.rmtree(tmp_path / "run/adapter")
    again = finetune(config(eval_fraction=0.2, resume=True))
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    """The same run, which can be gone on with; what is no checkpoint of ours, or holds more than one, is left alone."""
    finetune(config("all", save_every=1, keep_checkpoints=4))
    assert names(tmp_path / "all/checkpoints") == [f"step-{step:06d}" for step in (1, 2, 3, 4)]
    finetune(config("two", save_every=1, keep_checkpoints=2))
    assert names(tmp_path / "two/checkpoints") == ["step-000003", "step-000004"]
    same_files(tmp_path / "all/checkpoints/step-000004", tmp_path / "two/checkpoints/step-000004")

    cut = tmp_path / "cut/checkpoints"
    shutil.copytree(
        tmp_path / "all", tmp_path / "cut", ignore=shutil.ignore_patterns("adapter", "step-000003", "step-000004")
    )
    in_the_way = cut / ".step-000003.part"  # where the next checkpoint is to be written
    in_the_way.touch()
    going_on = config("cut", save_every=1, keep_checkpoints=1, resume=True)
    assert "cannot be written" in refused(going_on)[0]
    assert names(cut) == [in_the_way.name, "step-000001", "step-000002"]
    in_the_way.unlink()
    (cut / "step-000001/notes.txt").write_text("the best of all")
    shutil.copytree(cut / "step-000001", cut / "step-000000").joinpath("state.json").unlink()  # not whole
    shutil.copytree(cut / "step-000002", cut / "best")
    finetune(going_on)
    assert names(cut) == ["best", "step-000000", "step-000001", "step-000004"]
    same_files(tmp_path / "all/checkpoints/step-000004", cut / "step-000004")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qlora", "finetune", *arguments]


def test_control_c_then_the_printed_command_is_the_uninterrupted_run(config, tmp_path):
    """In real processes: what is printed is what is typed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config(steps=400, dropout=0.1))))
    process = subprocess.Popen(
        command("--config", str(tmp_path / "run.yaml")), stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (output / "metrics.jsonl").is_file() or (output / "metrics.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    (stopped,) = (output / "checkpoints").iterdir()
    step = int(stopped.name.removeprefix("step-"))
    assert f"Stopped after step {step}" in said and 5 <= step < 400
    assert len(metrics(output)) == step

    (line,) = [line.strip() for line in said.splitlines() if "--resume" in line]
    assert line == f"qlora finetune --config {output}/config.yaml --resume"
    subprocess.run(command(*line.split()[2:]), check=True, capture_output=True, env=environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finetune(config("whole", steps=400, dropout=0.1))
    torch.set_num_threads(threads)
    same_files(output / "checkpoints/step-000400", tmp_path / "whole/checkpoints/step-000400")


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_resumed_under_another_budget_is_the_same_run_to_the_bit(config, tmp_path, capsys, state):
    usual = {"dropout": 0.1, "save_every": 2, "steps": 6, "optimizer_state": state}
    finetune(config("whole", **usual))
    shutil.copytree(
        tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("adapter", "step-000004", "step-000006")
    )
    capsys.readouterr()
    finetune(config("cut", resume=True, optimizer_memory="none", **usual))
    said = capsys.readouterr().out
    assert f"AdamW in {state}" in said and "of it spilled" in said
    same_files(tmp_path / "whole/checkpoints/step-000006", tmp_path / "cut/checkpoints/step-000006")
    assert not any(path.name.startswith(".") for path in (tmp_path / "cut").rglob("*"))
    (problem,) = refused(
        config("cut", resume=True, **usual | {"optimizer_state": {"float32": "8bit", "8bit": "float32"}[state]})
    )
    assert problem.startswith("optimizer_state=") and f"the run began with optimizer_state={state}" in problem
