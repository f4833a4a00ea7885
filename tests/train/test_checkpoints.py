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
from safetensors.torch import load_file

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
        time.sleep(0.05 + 0.3 * dice.random())
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
