"""What finetune refuses, before and in training, and what it leaves behind then."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import tiny
import torch
import transformers
from helpers import unsealed
from runs import metrics, refused, same_files

from qlora.export.bnb import quantize_checkpoint
from qlora.run.recipe import finetune
from qlora.specs import Quantization


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
        "Continue it with `resume`, or choose another folder."
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
        problem.startswith("steps=8: the cosine schedule was planned for 4 steps")
        and "only a run with `schedule=constant`" in problem
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
    state = unsealed(tmp_path / "run/checkpoints/step-000004") / "state.json"
    kept = json.loads(state.read_text())
    assert {name: kept["run"]["options"][name] for name in ("blocksize", "double_quant", "scales")} == {
        "blocksize": 64,
        "double_quant": True,
        "scales": "absmax",
    }
    longer = {"schedule": "constant", "resume": True, "steps": 5}
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
    quantize_checkpoint(
        str(place / "model"), tmp_path / "base", quantization=Quantization(4, 32, False, "mse"), dtype="fp32"
    )
    usual = {"model": str(tmp_path / "base")}
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


def test_a_model_that_cannot_recompute(config, tmp_path):
    """Of a type whose class in transformers says so."""
    options = transformers.OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=320, afn="gelu")
    torch.manual_seed(0)
    transformers.OpenAIGPTLMHeadModel(options).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    usual = {"model": str(tmp_path / "model"), "steps": 1, "bits": 4}
    (line,) = refused(config("recomputed", gradient_checkpointing=True, **usual))
    assert line.startswith("gradient_checkpointing=True: openai-gpt cannot recompute (")
    assert line.endswith(". Leave it out.") and not (tmp_path / "recomputed/checkpoints").exists()
    assert finetune(config("kept", **usual)).loss > 0


def test_harmless_changes_and_moved_files_resume(config, place, tmp_path):
    usual = {"dropout": 0.1, "save_every": 2}
    finetune(config("whole", **usual))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("adapter", "step-000004"))
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "data.jsonl", tmp_path / "sums.jsonl")
    changes = {"model": str(tmp_path / "model"), "data": str(tmp_path / "sums.jsonl")}
    changes |= {
        "save_every": 1,
        "eval_data": str(place / "held.jsonl"),
        "eval_every": 1,
        "gradient_checkpointing": True,
    }
    finetune(config("cut", resume=True, **(usual | changes)))
    same_files(tmp_path / "whole/checkpoints/step-000004", tmp_path / "cut/checkpoints/step-000004")
