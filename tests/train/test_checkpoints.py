"""Training checkpoints: whole, exact, or not there."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import UserError
from qlora.export.peft import load_adapter
from qlora.files import remove_partial
from qlora.layers.attach import adapter_parameters
from qlora.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, whole_checkpoint
from qlora.train.rng import random_states, set_random_states

IDS = torch.arange(3, 43).reshape(2, 20)


def training(kind: dict, seed: int):
    """A model with dropout and an AdamW with two groups, whose state is not all zeros."""
    model = tiny.adapted(tiny.llama(), seed=seed, dropout=0.2, **kind).train()
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(
        [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2]}], lr=1e-2, betas=(0.8, 0.95)
    )
    return model, optimizer


def steps(model, optimizer, count: int) -> None:
    for _ in range(count):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_checkpoint_brings_everything_back_to_the_bit(tmp_path, method):
    model, optimizer = training({"method": method}, seed=2)
    torch.manual_seed(8)
    steps(model, optimizer, 3)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"name": "a run", "rate": 1e-5})
    steps(model, optimizer, 3)

    torch.manual_seed(99)
    again, fresh = training({"method": method}, seed=3)
    steps(again, fresh, 1)
    state = load_checkpoint(folder, again, fresh)
    assert state["step"] == 3 and state["run"] == {"name": "a run", "rate": 1e-5}
    steps(again, fresh, 3)
    assert all(torch.equal(tensor, tiny.tensors(again)[name]) for name, tensor in tiny.tensors(model).items())
    for one, two in zip(adapter_parameters(model), adapter_parameters(again), strict=True):
        assert all(
            torch.equal(optimizer.state[one][key], fresh.state[two][key]) for key in ("step", "exp_avg", "exp_avg_sq")
        )
    assert {**fresh.param_groups[0], "params": 0} == {**optimizer.param_groups[0], "params": 0}
    assert folder.name == "step-000003" and latest_checkpoint(tmp_path) == folder
    assert not any(path.suffix in (".pt", ".bin", ".pkl") for path in folder.iterdir())
    assert torch.equal(
        load_adapter(tiny.llama(), folder).get_submodule("model.layers.0.mlp.up_proj").lora_A,
        load_file(folder / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"],
    )


def test_random_states():
    import random

    import numpy

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()

    draw()
    states = json.loads(json.dumps(random_states()))
    first = draw()
    draw()
    set_random_states(states)
    assert draw() == first


def test_a_checkpoint_of_another_optimizer(tmp_path):
    model, optimizer = training({}, seed=2)
    steps(model, optimizer, 1)
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {})
    with pytest.raises(UserError) as error:
        load_checkpoint(folder, model, torch.optim.SGD(adapter_parameters(model), lr=1.0))
    assert len(error.value.problems) == 2 and "AdamW, the run's SGD" in str(error.value)


def test_only_whole_checkpoints_are_used(tmp_path, capsys):
    assert latest_checkpoint(tmp_path) is None
    model, optimizer = training({}, seed=2)
    steps(model, optimizer, 1)
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    shutil.copytree(tmp_path / "checkpoints/step-000010", tmp_path / "checkpoints/.step-000011.1.part")
    shutil.copytree(tmp_path / "checkpoints/step-000010", tmp_path / "checkpoints/step-000012")
    (tmp_path / "checkpoints/step-000012/state.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step-000012"
    assert whole_checkpoint(tmp_path).name == "step-000010"
    assert "step-000012 is damaged (" in capsys.readouterr().err
    remove_partial(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints/.step-000011.1.part").exists()
    save_checkpoint(tmp_path, 12, model, optimizer, {})
    assert whole_checkpoint(tmp_path).name == "step-000012"


def rewritten(checkpoint: Path, **changes) -> None:
    """state.json with other values, and no manifest that would tell."""
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | changes))


@pytest.fixture
def trained(tmp_path):
    """(model, optimizer, their checkpoint of step 1)."""
    model, optimizer = training({}, seed=2)
    steps(model, optimizer, 1)
    return model, optimizer, save_checkpoint(tmp_path, 1, model, optimizer, {"name": "a run"})


@pytest.mark.parametrize("change", [{"betas": [0.1, 0.95]}, {"eps": 1.0}, {"weight_decay": 0.5}])
def test_the_optimizer_is_that_of_the_run(trained, change):
    model, optimizer, folder = trained
    kind = json.loads((folder / "state.json").read_text())["optimizer"]
    kind["groups"][1] |= change
    rewritten(folder, optimizer=kind)
    with pytest.raises(UserError) as error:
        load_checkpoint(folder, model, optimizer)
    (name,) = change
    assert [line.startswith(f"{name}=") for line in error.value.problems] == [True]


def zeros(tensors):
    return {}


def half(tensors):
    return {key: value for key, value in tensors.items() if "q_proj" not in key}


def no_v(tensors):
    return {key: value for key, value in tensors.items() if not key.endswith("exp_avg_sq")}


def nan(tensors):
    next(value for key, value in tensors.items() if key.endswith("exp_avg"))[0] = torch.nan
    return tensors


@pytest.mark.parametrize("change", [zeros, half, no_v, nan])
@pytest.mark.parametrize("listed", [True, False])  # False: of an earlier version, without the list of its state
def test_moments_that_are_missing_or_not_finite_are_refused(trained, change, listed):
    model, optimizer, folder = trained
    save_file(change(load_file(folder / "optimizer.safetensors")), folder / "optimizer.safetensors")
    kind = json.loads((folder / "state.json").read_text())["optimizer"]
    if not listed:
        del kind["state"]
    rewritten(folder, optimizer=kind)
    if not listed and change is no_v:
        return  # nothing tells which optimizer it was but its own load_state_dict
    before = tiny.tensors(model)
    with pytest.raises(UserError) as error:
        load_checkpoint(folder, model, optimizer)
    assert all("exp_avg" in line or "step" in line for line in error.value.problems)
    assert all(torch.equal(value, before[name]) for name, value in tiny.tensors(model).items())


def test_a_parameter_that_never_had_a_gradient_needs_no_moments(tmp_path):
    model, optimizer = training({}, seed=2)
    model(IDS, labels=IDS).loss.backward()
    adapter_parameters(model)[0].grad = None
    optimizer.step()
    assert load_checkpoint(save_checkpoint(tmp_path, 1, model, optimizer, {}), model, optimizer)["step"] == 1


@pytest.mark.parametrize("manifest", [True, False])
def test_a_renamed_checkpoint_is_refused(trained, manifest):
    model, optimizer, folder = trained
    if not manifest:
        rewritten(folder)
    moved = folder.rename(folder.with_name("step-000099"))
    with pytest.raises(UserError, match="step 1"):
        load_checkpoint(moved, model, optimizer)
    load_checkpoint(moved.rename(folder.with_name("best")), model, optimizer)


def test_what_is_not_finite_is_not_saved(trained, tmp_path):
    model, optimizer, _ = trained
    optimizer.state[adapter_parameters(model)[0]]["exp_avg_sq"][0] = torch.inf
    with pytest.raises(UserError, match=r"exp_avg_sq=\(not finite\)"):
        save_checkpoint(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_the_newest_whole_checkpoint_is_used_and_the_others_named(trained, tmp_path, capsys):
    model, optimizer, first = trained
    second, third = (save_checkpoint(tmp_path, step, model, optimizer, {"name": "a run"}) for step in (2, 3))
    shutil.copy(second / "optimizer.safetensors", third / "optimizer.safetensors")
    shutil.copy(second / "state.json", third / "state.json")
    (second / "tokenizer.json").write_text("{}")
    assert whole_checkpoint(tmp_path) == first
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("note: step-000003 is damaged (state.json is not what was written")
    assert said[1] == "note: step-000002 is damaged (tokenizer.json was added); going on from step-000001"
    (first / "optimizer.safetensors").unlink()
    with pytest.raises(UserError) as error:
        whole_checkpoint(tmp_path)
    assert len(error.value.problems) == 3 and "optimizer.safetensors is missing" in str(error.value)


def test_other_versions_are_noted(trained, capsys):
    model, optimizer, folder = trained
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 1 and set(manifest["versions"]) == {"qlora", "torch", "transformers", "backend"}
    manifest["versions"] |= {"torch": "1.0", "backend": "reference"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(folder, model, optimizer)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"torch 1.0 (now {torch.__version__}), backend reference (now native)" in line


def test_a_folder_with_more_than_a_checkpoint_is_set_aside(trained, tmp_path):
    model, optimizer, folder = trained
    (folder / "notes.txt").write_text("the best of all")
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert (tmp_path / "checkpoints/step-000001-2/notes.txt").read_text() == "the best of all"
    assert whole_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("room", [5_000, 60_000, 150_000])  # in the adapter, in the optimizer's state, in state.json
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, room):
    """RLIMIT_FSIZE refuses to let a file grow past it, as a full disk does."""
    model, optimizer = training({"method": "lora", "rank": 2}, seed=2)
    steps(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    sizes = sorted(path.stat().st_size for path in (tmp_path / "checkpoints/step-000001").iterdir())
    assert sizes[-1] > 5_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(room, sizes[-1] - 1), limits[1]))
    try:
        with pytest.raises(
            UserError,
            match=r"output=.*step-000002: the disk is full; nothing was left half written. Free some space and",
        ):
            save_checkpoint(tmp_path, 2, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path), model, optimizer)["step"] == 1


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import tiny, torch
    from qlora.layers.attach import adapter_parameters
    from qlora.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from qlora.files import remove_partial

    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    model = tiny.adapted(tiny.llama(), rank=64)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.0)

    def become(step):  # every tensor of a checkpoint tells its step
        with torch.no_grad():
            for p in adapter_parameters(model):
                p.fill_(step)
                moments = {name: torch.full_like(p, step) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(float(step))} | moments

    become(1)
    save_checkpoint(output, 1, model, optimizer, {})
    dice, halves, last = random.Random(0), 0, 1
    for round in range(12):
        child = os.fork()
        if child == 0:
            for step in range(last + 1, 10**6):
                become(step)
                save_checkpoint(output, step, model, optimizer, {})
        enough, limit = last + dice.randint(0, 2), time.monotonic() + 20
        while int(latest_checkpoint(output).name.removeprefix("step-")) < enough and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(0.05 * dice.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        halves += len(list((output / "checkpoints").glob(".*.part")))
        remove_partial(output / "checkpoints")
        for folder in sorted((output / "checkpoints").iterdir()):  # each that is there is whole
            step = int(folder.name.removeprefix("step-"))
            assert load_checkpoint(folder, model, optimizer)["step"] == step
            for p in adapter_parameters(model):
                assert all(bool((value == step).all()) for value in (p, *optimizer.state[p].values())), folder
        now = int(latest_checkpoint(output).name.removeprefix("step-"))
        assert now >= last
        last = now
        for folder in list((output / "checkpoints").iterdir())[:-1]:
            if folder != latest_checkpoint(output):
                __import__("shutil").rmtree(folder)
    print(halves, last)
"""


def test_a_kill_loses_only_the_checkpoint_being_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(tiny.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    halves, last = map(int, done.stdout.split()[-2:])
    assert halves >= 1 and last > 1, "the kills must hit checkpoints that are half written, and others must be done"
