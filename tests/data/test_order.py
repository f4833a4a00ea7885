"""Which examples a step sees: every one once an epoch, by the number of the step alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from qlora.data.order import epoch_order, run_length, split, step_count, step_indices, stream_length
from qlora.errors import UserError


def test_an_epoch_is_a_permutation_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    orders[0].clear()  # the caller's own list
    assert epoch_order(50, 0, 0) == epoch_order(50, 0, 0) != []


@pytest.mark.parametrize("count,per_step", [(10, 4), (10, 10), (3, 8), (7, 1), (1, 5)])
def test_the_stream_sees_every_example_once_an_epoch_and_depends_on_the_step_alone(count, per_step):
    steps = 40
    stream = [index for step in range(steps) for index in step_indices(count, per_step, 5, step)]
    assert len(stream) == steps * per_step
    for epoch in range(len(stream) // count):
        assert stream[epoch * count : (epoch + 1) * count] == epoch_order(count, 5, epoch)
    resumed = [index for step in range(17, steps) for index in step_indices(count, per_step, 5, step)]
    assert resumed == stream[17 * per_step :]


@pytest.mark.parametrize(
    "count,per_step,epochs,steps",
    [(10, 4, 1, 3), (10, 4, 2, 5), (10, 4, 0.5, 2), (3, 8, 1, 1), (100, 8, 0.001, 1), (12, 4, 1, 3), (10, 3, 1.5, 5)],
)
def test_a_run_by_epochs_sees_each_example_so_often_and_then_ends(count, per_step, epochs, steps):
    limit = stream_length(count, epochs)
    assert step_count(count, per_step, epochs) == steps
    stream = [index for step in range(steps) for index in step_indices(count, per_step, 0, step, limit)]
    assert len(stream) == limit == max(1, round(count * epochs))
    assert set(Counter(stream).values()) <= {int(epochs), int(epochs) + 1}
    with pytest.raises(ValueError, match="past the limit"):
        step_indices(count, per_step, 0, steps, limit)


def test_the_length_of_a_run_is_given_in_steps_or_in_epochs():
    assert run_length(10, 4, steps=7, epochs=1.0, warmup=99) == {"steps": 7, "examples": 28}
    assert run_length(10, 4, steps=None, epochs=1.5, warmup=4) == {"steps": 4, "examples": 15}
    with pytest.raises(UserError, match=r"warmup=5: epochs=1\.5 are only 4 steps"):
        run_length(10, 4, steps=None, epochs=1.5, warmup=5)


def test_split_is_seeded_whole_and_in_order():
    records = [{"text": str(number)} for number in range(20)]
    train, held = split(records, 0.2, seed=0)
    assert len(held) == 4 and sorted([*train, *held], key=lambda record: int(record["text"])) == records
    assert [record for record in records if record in train] == train
    assert split(records, 0.2, seed=0) == (train, held) != split(records, 0.2, seed=1)
    assert split(records, 0.0, seed=0) == (records, [])
    assert len(split(records, 0.001, seed=0)[1]) == 1
    with pytest.raises(UserError, match=r"eval_fraction=0\.99: holds out 20 of 20 records"):
        split(records, 0.99, seed=0)
