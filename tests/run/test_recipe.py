"""finetune from end to end on a tiny model: files, resuming, refusals, and that no option is without effect."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from qlora.config.commands import EvalConfig, FinetuneConfig
from qlora.config.options import from_yaml
from qlora.errors import UserError
from qlora.export.bnb import quantize_checkpoint
from qlora.layers.attach import named_adapters
from qlora.run.adapted import load_adapted
from qlora.run.commands import evaluate_command
from qlora.run.recipe import finetune
from qlora.specs import Quantization
from qlora.train.checkpoint import read_state


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model/`, `data.jsonl` and `held.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data.jsonl")
    tiny.write_data(folder / "held.jsonl", count=8, seed=7)
    return folder


SHORT = dict(steps=4, batch_size=2, rank=4, learning_rate=1e-2, device="cpu", dtype="fp32")


@pytest.fixture
def config(place, tmp_path):
    """Options of a short run; changes are given by name."""

    def make(output: str = "run", **changes) -> FinetuneConfig:
        usual = SHORT | dict(model=str(place / "model"), data=str(place / "data.jsonl"), output=str(tmp_path / output))
        if "epochs" in changes:
            del usual["steps"]
        return FinetuneConfig(**(usual | changes))

    return make


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_files(one: Path, two: Path) -> None:
    """Every adapter and optimizer tensor of two checkpoints, and the random states, bit by bit."""
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        assert first.keys() == second.keys() and len(first) > 10
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert read_state(one)["random"] == read_state(two)["random"]


# ---------------------------------------------------------------- one run


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
        "12 of 2 examples, end to end without padding",
    ):
        assert words in said.out
    assert (
        f"loss {result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after" in said.out
        and str(result.adapter) in said.out
    )
    assert "step 12/12" in said.err


def test_the_adapter_is_the_last_checkpoint_and_evaluates_to_the_last_loss(config, place, tmp_path):
    result = finetune(config(eval_data=str(place / "held.jsonl")))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (result.adapter / name).read_bytes() == (tmp_path / "run/checkpoints/step-000004" / name).read_bytes()
    found = evaluate_command(EvalConfig(adapter=str(result.adapter), data=str(place / "held.jsonl"), device="cpu"))
    assert found["loss"] == pytest.approx(result.eval_loss_after, rel=1e-6)
    assert found["examples"] == 8 and found["adapter"] == str(result.adapter)
    bare = evaluate_command(
        EvalConfig(model=str(place / "model"), data=str(place / "held.jsonl"), device="cpu", dtype="fp32")
    )
    assert bare["loss"] == pytest.approx(result.eval_loss_before, rel=1e-6)


def test_the_first_step_is_the_definition(config, place, tmp_path):
    """Loss and learning of one step, computed again from the parts: the recipe wires them as it says."""
    from qlora.data.batch import collate
    from qlora.data.order import step_indices
    from qlora.data.records import read_records
    from qlora.data.tokenize import tokenize
    from qlora.layers.loss import loss_sum
    from qlora.models.load import load_base
    from qlora.models.source import load_tokenizer

    finetune(config(steps=1, batch_size=2, accumulate=3, seed=5))
    data = tokenize(read_records(str(place / "data.jsonl")), load_tokenizer(str(place / "model")))
    batch = collate([data.examples[i] for i in step_indices(len(data.examples), 6, 5, 0)])
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


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(("method", "stopped"), [("dora", 2), ("dora", 6), ("lora", 4), ("dora", 8)])
def test_resumed_is_uninterrupted_to_the_bit(config, tmp_path, method, stopped):
    """With dropout, warmup, accumulation and evaluation; the run is cut off between two checkpoints."""
    usual = dict(
        method=method,
        dropout=0.2,
        steps=8,
        warmup=3,
        accumulate=2,
        save_every=2,
        eval_fraction=0.2,
        eval_every=3,
        weight_decay=0.1,
    )
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


def test_a_constant_run_can_be_made_longer(config, tmp_path):
    usual = dict(schedule="constant", dropout=0.1)
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
    in_the_way = cut / f".step-000003.{os.getpid()}.part"  # where the next checkpoint is to be written
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qlora.cli", "finetune", *arguments]


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
    usual = dict(dropout=0.1, save_every=2, steps=6, optimizer_state=state)
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


# ---------------------------------------------------------------- refusals


def refused(config: FinetuneConfig) -> list[str]:
    with pytest.raises(UserError) as error:
        finetune(config)
    return error.value.problems


def test_everything_cheap_is_told_at_once_and_nothing_is_left(config, tmp_path, place):
    problems = refused(
        config(
            model=str(place / "modell"), data=str(place / "no.jsonl"), eval_data=str(place / "nix.jsonl"), resume=True
        )
    )
    assert [line.split("=")[0] for line in problems] == ["resume", "model", "data", "data"]
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_written_over(config, tmp_path):
    finetune(config())
    kept = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    (problem,) = refused(config())
    assert (
        problem == f"output={tmp_path}/run: holds an earlier run; its last checkpoint is step-000004. "
        "Go on with --resume, or choose another folder."
    )
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == kept


def test_other_output_folders_that_will_not_do(config, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("dear")
    assert "is not empty (dear.txt)" in refused(config("letters"))[0]
    assert "cannot be written" in refused(config("letters/dear.txt"))[0]
    assert "holds no checkpoint to go on from" in refused(config("new", resume=True))[0]


def test_what_ended_before_its_first_checkpoint_may_be_written_over(config, tmp_path):
    finetune(config())
    shutil.rmtree(tmp_path / "run/checkpoints")
    shutil.rmtree(tmp_path / "run/adapter")
    finetune(config(steps=2))
    assert len(metrics(tmp_path / "run")) == 2


def test_a_folder_in_use(config, tmp_path):
    """flock belongs to the open file, so this process can be the other run."""
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another run is writing to it" in refused(config())[0]
    os.close(handle)
    finetune(config(steps=1))


def test_a_full_disk(config, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        problems = refused(config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(problems) == 1 and "the disk is full" in problems[0]
    finetune(config(steps=1))


def test_no_room_for_spilled_state_is_told_before_training(config, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        (problem,) = refused(config(optimizer_memory="none"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk has no room" in problem and not (tmp_path / "run").exists()


def test_an_error_in_training_gives_the_spilled_state_back(config, tmp_path):
    (line,) = refused(config(learning_rate=1e20, steps=6, clip=0.0, optimizer_memory="none"))
    assert "is no finite number at step" in line
    assert not [
        link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and str(tmp_path) in os.readlink(link)
    ]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(config, tmp_path):
    problems = refused(config(learning_rate=1e20, steps=6, save_every=1, clip=0.0))
    assert "is no finite number at step" in problems[0]
    step = int(problems[0].split("at step ")[1].split(".")[0])
    assert (
        sorted((tmp_path / "run/checkpoints").iterdir())[-1].name == f"step-{step - 1:06d}"
        and len(metrics(tmp_path / "run")) == step - 1
    )


def test_a_resume_that_would_be_another_run(config, place, tmp_path):
    finetune(config(save_every=2))
    problems = refused(
        config(resume=True, rank=8, seed=3, batch_size=4, learning_rate=1e-3, dropout=0.1, targets="q_proj", bits=16)
    )
    assert [line.split("=")[0] for line in problems] == [
        "batch_size",
        "bits",
        "dropout",
        "learning_rate",
        "rank",
        "seed",
        "targets",
    ]
    assert problems[4] == "rank=8: the run began with rank=4. Resume with that, or start anew in another folder."
    (problem,) = refused(config(resume=True, steps=8))
    assert (
        problem.startswith("steps=8: the cosine schedule was laid out for 4 steps")
        and "only a run with --schedule constant" in problem
    )
    (problem,) = refused(config(resume=True, data=str(place / "held.jsonl")))
    assert problem.startswith("data=(changed): the run began on 24 training examples")
    tiny.write_model(tmp_path / "other", seed=9)
    (problem,) = refused(config(resume=True, model=str(tmp_path / "other")))
    assert "was trained on" in problem
    (problem,) = refused(config(resume=True, dtype="bf16"))
    assert problem.startswith("dtype=bf16: the run began with dtype=fp32")


def test_how_the_base_was_quantized_is_part_of_the_run(config, tmp_path):
    """Given or not, the same values are the same run; checkpoints from before `scales` had absmax."""
    finetune(config(schedule="constant"))
    state = tmp_path / "run/checkpoints/step-000004/state.json"
    kept = json.loads(state.read_text())
    assert {name: kept["run"]["options"][name] for name in ("blocksize", "double_quant", "scales")} == {
        "blocksize": 64,
        "double_quant": True,
        "scales": "absmax",
    }
    longer = dict(schedule="constant", resume=True, steps=5)
    assert [line.split(". ")[0] for line in refused(config(scales="mse", blocksize=128, **longer))] == [
        "blocksize=128: the run began with blocksize=64",
        "scales=mse: the run began with scales=absmax",
    ]
    del kept["run"]["options"]["scales"]
    state.write_text(json.dumps(kept))
    assert refused(config(scales="mse", **longer))[0].startswith("scales=mse: the run began with scales=absmax")
    assert finetune(config(scales="absmax", blocksize=64, **longer)).steps == 5


def test_options_that_the_base_contradicts(config, place, tmp_path):
    """Said before anything is loaded, together with what else is wrong; what is not given comes from the checkpoint."""
    quantization = Quantization(blocksize=32, double_quant=False, scales="mse")
    quantize_checkpoint(str(place / "model"), tmp_path / "base", quantization=quantization, dtype="fp32")
    usual = dict(model=str(tmp_path / "base"))
    problems = refused(config(blocksize=64, double_quant=True, scales="absmax", data="nowhere.jsonl", **usual))
    assert [line.split("=")[0] for line in problems] == ["blocksize", "double_quant", "scales", "data"]
    assert problems[0] == (
        "blocksize=64: this checkpoint is NF4 already with blocksize=32. Leave it out, or use the 16-bit original."
    )
    assert refused(config(scales="mse", **usual)) == [
        "scales=mse: this checkpoint is NF4 already. Leave it out, or use the 16-bit original."
    ]
    problems = refused(config(bits=16, blocksize=64, scales="absmax"))
    assert [line.split(". ")[0] for line in problems] == [
        "blocksize=64: has no effect on 16-bit weights",
        "scales=absmax: has no effect on 16-bit weights",
    ]
    for output, given in (("left out", {}), ("agreeing", {"blocksize": 32, "double_quant": False})):
        finetune(config(output, steps=1, **usual, **given))
        base = json.loads((tmp_path / output / "adapter/qlora.json").read_text())["base"]
        assert (base["blocksize"], base["double_quant"], base["scales"]) == (32, False, None)
    same_files(tmp_path / "left out/checkpoints/step-000001", tmp_path / "agreeing/checkpoints/step-000001")


def test_harmless_changes_and_moved_files_resume(config, place, tmp_path):
    usual = dict(dropout=0.1, save_every=2)
    finetune(config("whole", **usual))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("adapter", "step-000004"))
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "data.jsonl", tmp_path / "sums.jsonl")
    changes = dict(model=str(tmp_path / "model"), data=str(tmp_path / "sums.jsonl"))
    changes |= dict(save_every=1, eval_data=str(place / "held.jsonl"), eval_every=1, gradient_checkpointing=True)
    finetune(config("cut", resume=True, **(usual | changes)))
    same_files(tmp_path / "whole/checkpoints/step-000004", tmp_path / "cut/checkpoints/step-000004")


# ---------------------------------------------------------------- every option does something


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "run"
    where = dict(model=str(place / "model"), data=str(place / "data.jsonl"), output=str(output))
    finetune(FinetuneConfig(**where, **SHORT))
    return output


CHANGES_THE_ADAPTER = {
    "bits": 16,
    "blocksize": 32,
    "double_quant": False,
    "scales": "mse",
    "method": "lora",
    "rank": 2,
    "alpha": 4.0,
    "rslora": True,
    "dropout": 0.5,
    "init": "gaussian",
    "targets": "q_proj",
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup": 2,
    "weight_decay": 0.5,
    "clip": 0.01,
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 1e-2,
    "steps": 3,
    "epochs": 0.1,
    "batch_size": 3,
    "accumulate": 2,
    "max_tokens": 34,
    "truncate": "drop",
    "optimizer_state": "8bit",
    "train_on_prompt": True,
    "seed": 1,
    "dtype": "bf16",
    "eval_fraction": 0.5,
}
TESTED_ELSEWHERE = {
    "model",
    "data",
    "output",
    "eval_data",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "resume",
    "gradient_checkpointing",
    "optimizer_memory",  # above
    "format",
    "device",
    "trust_remote_code",
    "revision",
    "tensorboard",  # below
    "memory",  # test_plan.py, test_optim_memory.py
}


def test_no_option_is_forgotten():
    assert CHANGES_THE_ADAPTER.keys() | TESTED_ELSEWHERE == {field.name for field in dataclasses.fields(FinetuneConfig)}


@pytest.mark.parametrize("option", CHANGES_THE_ADAPTER)
def test_options_that_change_the_adapter(config, plain, tmp_path, option):
    companions = {"truncate": {"max_tokens": 34}}.get(option, {})
    if companions:
        finetune(config("plain", **companions))
        plain = tmp_path / "plain"
    finetune(config(**{option: CHANGES_THE_ADAPTER[option]}, **companions))
    before, after = (load_file(output / "adapter/adapter_model.safetensors") for output in (plain, tmp_path / "run"))
    assert before.keys() != after.keys() or any(
        before[key].shape != after[key].shape or not torch.equal(before[key], after[key]) for key in before
    )


def test_the_same_options_give_the_same_bits(config, plain, tmp_path):
    torch.manual_seed(4321)
    finetune(config())
    same_files(plain / "checkpoints/step-000004", tmp_path / "run/checkpoints/step-000004")


def test_weight_decay_leaves_magnitudes_alone(config, tmp_path):
    """Decayed to 0, m would take the base's own weights along."""
    for output, decay in (("without", 0.0), ("with", 0.9)):
        finetune(config(output, steps=1, weight_decay=decay))
    one, two = (load_file(tmp_path / output / "adapter/adapter_model.safetensors") for output in ("without", "with"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith("lora_magnitude_vector"))
    assert not any(torch.equal(one[key], two[key]) for key in one if key.endswith("lora_A.weight"))


def test_tensorboard(config, tmp_path):
    finetune(config(tensorboard=True))
    assert any(path.name.startswith("events") for path in (tmp_path / "run/tensorboard").iterdir())


def test_gradient_checkpointing_is_used(config, tmp_path, monkeypatch):
    """Each layer runs twice a step."""
    import transformers

    calls = []
    forward = transformers.models.llama.modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        transformers.models.llama.modeling_llama.LlamaAttention,
        "forward",
        lambda self, *inputs, **options: (calls.append(1), forward(self, *inputs, **options))[1],
    )
    counted = []
    for checkpointing in (False, True):
        calls.clear()
        finetune(config(str(checkpointing), gradient_checkpointing=checkpointing))
        counted.append(len(calls))
    assert counted[1] - counted[0] == 2 * 4  # two layers, four steps


def test_options_about_the_input_are_passed_on(config, tmp_path):
    assert "format=alpaca" in refused(config(format="alpaca"))[0]
    if not torch.cuda.is_available():
        assert any(line.startswith("device=cuda") for line in refused(config(device="cuda")))
    finetune(config(revision="v9"))
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["revision"] == "v9"


def test_code_of_a_model_runs_only_if_asked_for(config, place, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    about = json.loads((model / "config.json").read_text())
    about |= {
        "model_type": "our_own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (model / "config.json").write_text(json.dumps(about))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'our_own'\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "trust" in " ".join(refused(config("no", model=str(model))))
    assert finetune(config("yes", model=str(model), trust_remote_code=True)).steps == 4
