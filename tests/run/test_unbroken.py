"""What a run survives: readers that go, signals, files that are moved or linked, a number that is not finite."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from runs import metrics, names, refused, same_files
from safetensors.torch import load_file

from qlora.cli import main
from qlora.config.options import to_yaml
from qlora.errors import UserError
from qlora.run.output import claimed
from qlora.run.recipe import finetune


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter/adapter_model.safetensors")


def written(config, tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return str(tmp_path / "run.yaml")


def when_saved(monkeypatch, act) -> None:
    """Call `act` with each folder that a tokenizer is saved to: transformers' part of every checkpoint and adapter."""
    base, save = transformers.PreTrainedTokenizerBase, transformers.PreTrainedTokenizerBase.save_pretrained

    def saved(self, folder, *rest, **options):
        act(Path(folder))
        return save(self, folder, *rest, **options)

    monkeypatch.setattr(base, "save_pretrained", saved)


# ---------------------------------------------------------------- who reads


@pytest.mark.parametrize("lost", ["pipe", "closed", "none", "ascii", "full"])
def test_a_lost_reader_does_not_end_a_run(config, place, tmp_path, monkeypatch, lost):
    data = shutil.copy(place / "data.jsonl", tmp_path / "한국.jsonl")

    def stream():
        if lost == "none":
            return None
        if lost == "ascii":
            return open(tmp_path / "said", "a", encoding="ascii")
        if lost == "full":
            return open("/dev/full", "w")
        reader, writer = os.pipe()
        os.close(reader)
        made = os.fdopen(writer, "w")
        if lost == "closed":
            made.close()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        patch.setattr(sys, "stderr", stream())
        finetune(config(data=str(data)))
        for made in (sys.stdout, sys.stderr):
            if made is not None:
                made.close()
    assert adapter(tmp_path / "run") and len(metrics(tmp_path / "run")) == 4
    if lost == "ascii":
        assert r"\ud55c\uad6d.jsonl" in (tmp_path / "said").read_text()


def test_the_command_with_closed_streams_ends_well(config, tmp_path):
    """As by cron, or `| head -1`: descriptor 1 is closed, the reader of 2 is gone."""
    file = written(config(steps=2), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = f"exec {sys.executable} -m qlora finetune --config {file} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    assert done.returncode == 0 and adapter(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2  # nothing was printed into it, as the lowest free descriptor


def test_a_lost_reader_does_not_end_a_quantization(place, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        assert main(["quantize", "--model", str(place / "model"), "--output", str(tmp_path / "out")]) == 0
        sys.stdout.close()
    assert (tmp_path / "out/config.json").is_file()


# ---------------------------------------------------------------- who stops it


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_once_how_to_go_on(config, tmp_path, capsys, number):
    file = written(config(steps=2000), tmp_path)

    def shoot():
        while not (tmp_path / "run/metrics.jsonl").is_file() or len(metrics(tmp_path / "run")) < 3:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, number)

    thread = threading.Thread(target=shoot)
    thread.start()
    assert main(["finetune", "--config", file]) == 128 + number
    thread.join()
    (checkpoint,) = names(tmp_path / "run/checkpoints")
    said = capsys.readouterr().err
    assert [line.strip() for line in said.splitlines() if "--config" in line] == [
        f"qlora finetune --config {tmp_path}/run/config.yaml --resume"
    ]
    assert f"Stopped after step {int(checkpoint[5:])}, with a checkpoint" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_while_the_adapter_is_written_says_how_to_go_on(config, tmp_path, monkeypatch, capsys, number):
    file = written(config(), tmp_path)
    with monkeypatch.context() as patch:
        when_saved(patch, lambda folder: folder.name.startswith(".adapter") and signal.raise_signal(number))
        assert main(["finetune", "--config", file]) == 128 + number
    said = capsys.readouterr().err
    assert said.count("--resume") == 1 and "the last checkpoint is that of step 4" in said
    assert names(tmp_path / "run") == ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert main(["finetune", "--config", f"{tmp_path}/run/config.yaml", "--resume"]) == 0
    assert adapter(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_parts_of_other_commands(place, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        when_saved(patch, lambda folder: signal.raise_signal(number))
        command = ["quantize", "--model", str(place / "model"), "--output", str(tmp_path / "out")]
        assert main(command) == 128 + number
    assert names(tmp_path) == [] and "ended by SIG" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_training_thread_hears_control_c(place, tmp_path, config):
    """The main thread dies of it, and Python then waits for the others: the run stops there, with a checkpoint."""
    code = (
        "import signal, sys, threading, time; from pathlib import Path; from qlora import finetune\n"
        "from qlora.config.options import from_yaml; from qlora.config.commands import FinetuneConfig\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"config = from_yaml(FinetuneConfig, {written(config(steps=100_000), tmp_path)!r})\n"
        "threading.Thread(target=finetune, args=(config,)).start()\n"
        f"log = Path({str(tmp_path / 'run/metrics.jsonl')!r})\n"
        "while not log.is_file() or log.stat().st_size < 500: time.sleep(0.01)\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.count("Continue:") == 1 and len(names(tmp_path / "run/checkpoints")) == 1, done.stderr


# ---------------------------------------------------------------- its files


def test_saved_by_time_and_the_same_run(config, tmp_path):
    """Two of the checkpoints by time stay, and all that were asked for; each goes on to the same bits."""
    usual = {"steps": 7, "dropout": 0.1}
    finetune(config("plain", save_minutes=0, **usual))
    finetune(config("timed", save_minutes=1e-9, save_every=3, **usual))
    kept = [f"step-{step:06d}" for step in (3, 4, 5, 6, 7)]
    assert names(tmp_path / "plain/checkpoints") == kept[-1:] and names(tmp_path / "timed/checkpoints") == kept
    same_files(*(tmp_path / output / "checkpoints/step-000007" for output in ("plain", "timed")))
    for step in kept[2:]:
        shutil.rmtree(tmp_path / "timed/checkpoints" / step)
    shutil.rmtree(tmp_path / "timed/adapter")
    finetune(config("timed", resume=True, **usual))
    same_files(*(tmp_path / output / "checkpoints/step-000007" for output in ("plain", "timed")))


def test_resume_auto(config, tmp_path):
    """Starts where there is no checkpoint, goes on where there is one; `resume` alone is refused without."""
    finetune(config("whole", steps=4))
    (line,) = refused(config(resume=True))
    assert line.endswith("Start without `resume`, or with `resume=auto`.")
    finetune(config(resume="auto", save_every=2))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    shutil.rmtree(tmp_path / "run/adapter")
    finetune(config(resume="auto"))
    assert len(metrics(tmp_path / "run")) == 4
    same_files(*(tmp_path / output / "checkpoints/step-000004" for output in ("whole", "run")))


def test_files_of_a_run_replace_links(config, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    for name in (".config.yaml.123.part", ".metrics.jsonl.7.part"):  # left by a kill
        (tmp_path / "run" / name).touch()
    finetune(config())
    assert (tmp_path / "mine").read_text() == "mine" and len(metrics(tmp_path / "run")) == 4
    assert names(tmp_path / "run") == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl"]


def test_a_full_disk_keeps_the_config(config, tmp_path):
    finetune(config(schedule="constant"))
    before = (tmp_path / "run/config.yaml").read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        (line,) = refused(config(schedule="constant", steps=6, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in line
    assert (tmp_path / "run/config.yaml").read_text() == before and len(metrics(tmp_path / "run")) == 4
    assert names(tmp_path / "run") == ["adapter", "checkpoints", "config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("what", ["metrics removed", "metrics rotated", "folder moved", "folder removed"])
def test_what_is_taken_away_in_mid_run_does_not_end_it(config, tmp_path, what):
    output, moved = tmp_path / "run", tmp_path / "moved"

    def take():
        while not (output / "checkpoints/step-000030").is_dir():
            time.sleep(0.005)
        time.sleep(0.05)
        if what == "metrics removed":
            (output / "metrics.jsonl").unlink()
        elif what == "metrics rotated":
            (output / "metrics.jsonl").rename(output / "metrics.1")
        else:
            output.rename(moved)
            if what == "folder removed":
                shutil.rmtree(moved)

    thread = threading.Thread(target=take)
    thread.start()
    result = finetune(config(steps=60, save_every=30))
    thread.join()
    where = moved if what == "folder moved" else output
    assert result.output == where and adapter(where) and result.steps == 60
    assert result.tokens > 100 and result.loss is not None
    if what != "folder removed":  # what was written into it went with it
        assert metrics(where)[-1]["step"] == 60 and ("removed" not in what or len(metrics(where)) < 40)
    assert "step-000060" in names(where / "checkpoints") and (where / "config.yaml").is_file()
    assert output.exists() == (where == output)


def test_no_lock_on_this_file_system(config, tmp_path, monkeypatch, capsys):
    """flock is the border to the kernel: Lustre and some FUSE say ENOSYS."""
    import errno
    import fcntl

    def flock(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    finetune(config(steps=1))
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_lock_of_a_folder_that_was_removed_is_none(tmp_path, monkeypatch):
    """Its last holder removed the folder between our open and our lock: another run would make and lock a new one."""
    import fcntl

    folder, lock, removed = tmp_path / "run", fcntl.flock, []

    def flock(handle, how):
        if not removed:
            folder.rmdir()
            removed.append(folder)
        return lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(folder), pytest.raises(UserError, match="another run is writing to it"), claimed(folder):
        pass


@pytest.mark.parametrize("output", ["a\0b", "x" * 300])
def test_no_path(config, output):
    with pytest.raises(UserError, match="output="):
        finetune(config(output))


# ---------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """A model whose numbers are finite and overflow where it reads "Z", and data with one, in line 8."""
    folder = tmp_path_factory.mktemp("poisoned")
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, tie_word_embeddings=False))
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer("Z").input_ids[0]] = 3e38 * torch.tensor([1.0, -1.0]).repeat(32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = tiny.write_data(folder / "data.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace("?", "Z?")
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_nan_names_its_examples_and_what_to_do_and_can_be_skipped(config, poisoned, tmp_path, capsys):
    where = {"model": str(poisoned / "model"), "data": str(poisoned / "data.jsonl"), "dropout": 0.2, "steps": 12}
    (line,) = refused(config("run", save_every=1, **where))
    step = len(metrics(tmp_path / "run")) + 1
    assert line.startswith(f"loss=nan: is no finite number at step {step}. Its examples: {poisoned}/data.jsonl line ")
    assert "line 8" in line and f"The last checkpoint is step-{step - 1:06d}." in line
    assert line.endswith(f"qlora finetune --config {tmp_path}/run/config.yaml --resume --on-nan skip.")
    capsys.readouterr()
    result = finetune(config("whole", on_nan="skip", **where))
    assert result.skipped == 1 and "1 updates" in capsys.readouterr().out
    (skipped,) = [found for found in metrics(tmp_path / "whole") if found.get("skipped")]
    assert skipped["step"] == step and skipped["loss"] is None and skipped["grad_norm"] is None
    assert finetune(config("run", on_nan="skip", resume=True, **where)).skipped == 1
    same_files(*(tmp_path / output / "checkpoints/step-000012" for output in ("whole", "run")))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000012")  # and from behind the skipped one
    finetune(config("run", on_nan="skip", resume=True, **where))
    same_files(*(tmp_path / output / "checkpoints/step-000012" for output in ("whole", "run")))


def test_many_skipped_in_a_row_stop_also_across_a_resume(config, tmp_path):
    endless = {"learning_rate": 1e20, "clip": 0.0, "steps": 40, "on_nan": "skip", "schedule": "constant"}
    (line,) = refused(config(save_every=5, **endless))
    assert "--on-nan" not in line
    lines = metrics(tmp_path / "run")
    assert [found["step"] for found in lines if found.get("skipped")] == list(range(len(lines) - 9, len(lines) + 1))
    refused(config(resume=True, **endless))
    assert len(metrics(tmp_path / "run")) == len(lines)


def test_what_the_last_update_made_is_looked_at(config, tmp_path, capsys):
    (line,) = refused(config(steps=1, learning_rate=1e39, clip=0.0))
    assert "is no finite number at step 1. No checkpoint was saved before it" in line
    assert names(tmp_path / "run") == ["config.yaml", "metrics.jsonl"]
    assert "a learning rate of 1e+39 seldom teaches anything" in capsys.readouterr().out


def test_a_held_out_loss_that_is_no_number_keeps_the_steps(config, poisoned, tmp_path):
    """The data is right, the held-out data is not: said before the first step, or at its end with a checkpoint."""
    where = {"model": str(poisoned / "model"), "data": str(tiny.write_data(tmp_path / "data.jsonl"))}
    (line,) = refused(config(eval_data=str(poisoned / "data.jsonl"), **where))
    assert "is no finite number" in line and not (tmp_path / "run/checkpoints").exists()
    finetune(config(schedule="constant", **where))
    (line,) = refused(
        config(resume=True, schedule="constant", steps=6, eval_data=str(poisoned / "data.jsonl"), eval_every=5, **where)
    )
    assert "is no finite number" in line and names(tmp_path / "run/checkpoints")[-1] == "step-000005"
    for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 10**18}, {"accumulate": 10**7}, {"epochs": 1e300}, {"steps": 10**30}]
)
def test_runs_that_would_never_end(config, changes):
    with pytest.raises(UserError) as error:
        finetune(config(**changes))
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("changes", [{"clip": 1e-320}, {"dropout": 0.999999999}])
def test_options_that_leave_nothing_to_learn(config, changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        config(**changes)


def test_memory_that_runs_out_before_a_step_is_one_line(config):
    """With room for 300 MB more: the first A alone is as large."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 300_000_000, limits[1]))
    try:
        (line,) = refused(config(rank=2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert line.startswith("memory=(all used): an allocation failed")
