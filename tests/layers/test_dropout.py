"""Dropout from a model's own generators: torch's numbers, nobody else's, the same again where a layer is recomputed."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import torch
from helpers import same_bits
from tiny import UNEVEN, examples

from qlora.data.batch import pack
from qlora.layers.attach import adapter_parameters, attach, named_adapters
from qlora.layers.dropout import Draws, base_drops, draws_of, dropout
from qlora.specs import AdapterSpec
from qlora.train.loop import Schedule, train
from qlora.train.rng import random_states, seed_generators, set_random_states
from qlora.train.step import accumulate, checkpoint_activations

CPU = torch.device("cpu")


def model_of(seed: int, p: float = 0.3, name: str = "llama") -> torch.nn.Module:
    model = tiny.random_model(name)
    seed_generators(seed)
    return attach(
        model, AdapterSpec(rank=3, dropout=p), draws=Draws(seed, CPU, p > 0, base_drops(model.config))
    ).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_numbers_are_torchs_own(dtype, p):
    """So that a run from before goes on to the bit."""
    x = torch.randn(7, 64).to(dtype)
    torch.manual_seed(5)
    draws = Draws(5, CPU)
    for _ in range(3):
        assert same_bits(dropout(x, p, draws), torch.nn.functional.dropout(x, p))


def test_a_start_is_what_it_was():
    """A is drawn as after `seed_generators`, and nothing is taken from the global generator."""
    with_own = model_of(3)
    state = torch.get_rng_state()
    global_one = tiny.random_model("llama")
    seed_generators(3)
    attach(global_one, AdapterSpec(rank=3, dropout=0.3))
    for name, tensor in tiny.tensors(with_own).items():
        assert same_bits(tensor, tiny.tensors(global_one)[name])
    seed_generators(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputed_layers_draw_the_same_again():
    found = []
    for recomputed in (False, True):
        model = model_of(4)
        tiny.disturb(model)
        if recomputed:
            checkpoint_activations(model)
        accumulate(model, [pack(examples(*UNEVEN))])
        accumulate(model, [pack(examples(*UNEVEN))])
        found.append([p.grad for p in adapter_parameters(model)] + list(draws_of(model).states().values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_trainings_in_one_process_are_each_the_run_alone(name):
    """In threads; each draws from torch's generator too, before its step or in GPT-2's own dropout."""

    def run(seed: int, model: torch.nn.Module, turn: threading.Barrier | None) -> dict[str, torch.Tensor]:
        data, optimizer = examples(*UNEVEN, seed=seed), torch.optim.SGD(adapter_parameters(model), lr=0.1)

        def batches(step: int):
            if turn is not None:
                turn.wait()
                if name == "llama":
                    torch.rand(step + seed)
            return [pack(data[:2]), pack(data[2:])]

        train(model, optimizer, batches, Schedule(5, lambda step: 0.1), log=lambda line: None)
        return tiny.tensors(model)

    alone = {seed: run(seed, model_of(seed, name=name), None) for seed in (1, 2)}
    models, found, turn = {seed: model_of(seed, name=name) for seed in (1, 2)}, {}, threading.Barrier(2)
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: run(seed, models[seed], turn)}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert all(torch.equal(tensor, found[seed][name]) for name, tensor in alone[seed].items())


def test_states_come_back():
    model = model_of(6)
    before = random_states(model)
    first = dropout(torch.ones(50), 0.5, draws_of(model))
    set_random_states(before, model)
    assert torch.equal(first, dropout(torch.ones(50), 0.5, draws_of(model)))
    assert not torch.equal(first, dropout(torch.ones(50), 0.5, draws_of(model)))


def test_states_from_before():
    """What torch's generator was to draw, ours draws; refused where the base drew from it too."""
    torch.manual_seed(9)
    expected = torch.nn.functional.dropout(torch.ones(50), 0.5)
    torch.manual_seed(9)
    old, model = random_states(), model_of(7)
    set_random_states(old, model)
    assert torch.equal(expected, dropout(torch.ones(50), 0.5, draws_of(model)))
    set_random_states(old, model_of(7, 0.0, "gpt2"))
    with pytest.raises(ValueError, match="was written by a version whose dropout drew other numbers"):
        set_random_states(old, model_of(7, 0.1, "gpt2"))


def test_a_copy_has_none():
    (_, layer), *_ = named_adapters(model_of(8))
    assert copy.deepcopy(layer).draws is None
