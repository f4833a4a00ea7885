"""PagedAdamW's memory: what is counted beforehand and really given up, steps that survive a failed allocation, disks
that are full.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from optimizers import gradients, parameters, same, same_state
from tiny import UNEVEN, examples
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data.batch import pack
from qlora.errors import UserError
from qlora.layers.attach import adapter_parameters
from qlora.optim import pages
from qlora.optim.adamw import PagedAdamW
from qlora.optim.pages import BLOCK, cut_into_pages, state_bytes
from qlora.train.checkpoint import load_checkpoint, save_checkpoint
from qlora.train.rng import random_states
from qlora.train.step import optimizer_step

# ---------------------------------------------------------------- pages


def test_every_element_lies_in_one_page():
    """Every element once, in order; whole blocks; nothing that fits a page is cut."""
    for block in (1, BLOCK):
        numels = [5, 0, pages.PAGE, 3 * pages.PAGE + 7, 256, 1, pages.PAGE - 200, 300]
        made = cut_into_pages(numels, block)
        covered = [0] * len(numels)
        for page in made:
            end = 0
            for span in page:
                assert span.at == end and span.first == covered[span.index] and span.at % block == 0
                covered[span.index] += span.count
                end = span.at + -(-span.count // block) * block
            assert end <= pages.PAGE
        assert covered == numels
        assert all(
            sum(span.index == i for page in made for span in page) == 1 for i, n in enumerate(numels) if n <= pages.PAGE
        )


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("memory", ["auto", "all", "none", "30KB", 60_000])
def test_the_bytes_are_known_beforehand(small_pages, tmp_path, state, memory):
    params = parameters()
    optimizer = PagedAdamW(params, state=state, memory=memory, folder=tmp_path)
    resident, spilled = state_bytes([p.numel() for p in params], state, memory)
    assert (optimizer.pager.resident, optimizer.pager.spilled) == (resident, spilled)
    if state == "float32":
        assert resident + spilled == 8 * sum(p.numel() for p in params)
    if isinstance(optimizer.memory, int):
        assert 0 < resident <= optimizer.memory
    optimizer.close()


PROCESS = """
import gc, json, sys, torch
from qlora.optim.adamw import PagedAdamW
from qlora.optim.pages import state_bytes
from qlora.train.memory import anonymous_memory
state, share, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(16, 4096), (4096, 16), (4096,)] * 16 + [(32000, 1900)]]
for p in params:
    p.grad = torch.full_like(p, 1e-3)
before = anonymous_memory()
total = sum(state_bytes([p.numel() for p in params], state))
optimizer = PagedAdamW(params, state=state, memory=int(share * total), folder=folder)
for _ in range(2):
    optimizer.step()
after = anonymous_memory() - before
entries = optimizer.state_dict()["state"]
saving = anonymous_memory() - before
full = sum(entry["exp_avg"].abs().sum().item() > 0 for entry in entries.values())
print(json.dumps([optimizer.pager.resident, optimizer.pager.spilled, after, saving, full]))
"""


def test_spilling_gives_memory_back(tmp_path):
    """510 MB of state, a budget of 10 %: RssAnon is lower by what is spilled, also while the state is being saved."""
    found = []
    for share in (1.0, 0.1):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, "float32", str(share), tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    (resident, nothing, much, _, full), (kept, spilled, little, saving, also) = found
    assert nothing == 0 and resident == kept + spilled >= 500e6 and kept <= 0.1 * resident and spilled >= 0.9 * resident
    assert much - little > 0.95 * spilled
    assert saving < little + 0.05 * spilled
    assert full == also == 49


@pytest.mark.parametrize("how", ["close", "forget"])
def test_everything_goes_back(small_pages, tmp_path, how):
    params = parameters()
    optimizer = PagedAdamW(params, memory="none", folder=tmp_path)
    gradients(params, 1)
    optimizer.step()

    def held() -> int:
        return sum(link.is_symlink() and str(tmp_path) in os.readlink(link) for link in Path("/proc/self/fd").iterdir())

    assert held() > 0
    if how == "close":
        optimizer.close()
        optimizer.close()
        for act in (optimizer.step, optimizer.state_dict, optimizer.make_room):
            with pytest.raises(UserError, match="was closed"):
                act()
    else:
        del optimizer
        gc.collect()
    assert held() == 0 and list(tmp_path.iterdir()) == [] and str(tmp_path) not in Path("/proc/self/maps").read_text()


# ---------------------------------------------------------------- failed allocations

FAILURE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. "
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
)


class Failing(TorchDispatchMode):
    """The allocator's error at the `fail`-th operation that returns new memory, once or (`always`) whenever the count
    comes there.
    """

    def __init__(self, fail: int = -1, always: bool = False):
        super().__init__()
        self.fail, self.always, self.count = fail, always, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(result.alias_info is None for result in func._schema.returns):
            self.count += 1
            if self.count == self.fail:
                self.count *= not self.always
                raise RuntimeError(FAILURE)
        return func(*args, **(kwargs or {}))


class OneStep:
    """Two steps of a tiny DoRA model with dropout, of which the second may be disturbed."""

    def __init__(self, folder: Path, **memory):
        self.model = tiny.adapted(tiny.llama(), dropout=0.3, targets="q_proj,down_proj").train()
        self.parameters = adapter_parameters(self.model)
        self.optimizer = PagedAdamW(self.parameters, folder=folder, **memory)
        self.batches = [pack(examples(*UNEVEN[:2])), pack(examples(*UNEVEN[2:]))]
        torch.manual_seed(3)
        self.step()

    def step(self) -> dict:
        return optimizer_step(self.model, self.optimizer, self.batches, 1e-2, 1.0)

    def result(self) -> tuple:
        state = self.optimizer.state_dict()["state"]
        moments = [value.clone() for entry in state.values() for value in entry.values()]
        return [p.detach().clone() for p in self.parameters], moments, random_states()["torch"]


def test_a_failure_anywhere_in_a_step_changes_nothing(monkeypatch, tmp_path):
    """At every allocation of the update, and at every 17th of forward and backward: weights, moments and random states
    come out as without it.
    """
    monkeypatch.setattr(pages, "PAGE", 256)
    monkeypatch.setattr(pages, "CHUNK", 128)
    undisturbed = OneStep(tmp_path)
    with Failing() as counter:
        metrics = undisturbed.step()
    weights, moments, random = undisturbed.result()
    update = OneStep(tmp_path)
    update.optimizer.zero_grad()
    for p in update.parameters:
        p.grad = torch.ones_like(p)
    with Failing() as last:
        update.optimizer.step()
    assert last.count >= 2 and counter.count > 500
    points = [*range(1, counter.count - last.count, 17), *range(counter.count - last.count, counter.count + 1)]
    for point in points:
        one = OneStep(tmp_path)
        before = one.optimizer.pager.resident
        with Failing(point) as failing:
            assert one.step() == metrics
        assert (
            failing.count > counter.count and 0 < one.optimizer.pager.resident < before and one.optimizer.pager.spilled
        )
        assert same(one.result()[0], weights) and same(one.result()[1], moments) and one.result()[2] == random, point
        one.optimizer.close()


def test_the_update_itself_allocates_nothing(small_pages, tmp_path):
    """Whatever fails in `step`, no parameter has moved: all allocations come before the first change."""
    params = parameters()
    optimizer = PagedAdamW(params, memory=12_000, folder=tmp_path)
    gradients(params, 1)
    with Failing() as counter:
        optimizer.step()
    for point in range(1, counter.count + 1):
        before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
        with Failing(point), pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            optimizer.step()
        assert same(before, params) and same_state(state, optimizer.state_dict())


@pytest.mark.parametrize("memory", ["all", "none", "auto"])
def test_when_there_is_nothing_to_evict(tmp_path, memory):
    one = OneStep(tmp_path, memory=memory)
    before = [p.detach().clone() for p in one.parameters]
    with Failing(50, always=True), pytest.raises(UserError) as error:
        one.step()
    (line,) = error.value.problems
    assert (
        "an allocation failed at step 1" in line
        and "`batch_size`" in line
        and ("`optimizer_memory=auto`" in line) == (memory == "all")
    )
    assert same(before, one.parameters)


REAL_FAILURE = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny
from tiny import UNEVEN, examples
from qlora.layers.attach import adapter_parameters
from qlora.data.batch import pack
from qlora.optim.adamw import PagedAdamW
from qlora.train.step import optimizer_step

model = tiny.adapted(tiny.llama(), dropout=0.3).train()
ballast = torch.nn.Parameter(torch.zeros(16 << 20))  # 128 MB of state
params = [*adapter_parameters(model), ballast]
optimizer = PagedAdamW(params, folder=sys.argv[1])
batches = [pack(examples(*UNEVEN))]


def grow(module, inputs, output):  # as a longer batch does: more than is allowed beside the state
    torch.empty(180 << 20, dtype=torch.uint8)
    return output + 0 * ballast.sum()


torch.manual_seed(3)
optimizer_step(model, optimizer, batches, 1e-2, 1.0)
model.model.norm.register_forward_hook(grow)
if sys.argv[3] != "free":
    field = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}[sys.argv[3]]
    used = int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024
    resource.setrlimit(getattr(resource, sys.argv[3]), (used + (150 << 20),) * 2)
optimizer_step(model, optimizer, batches, 1e-2, 1.0)
print(optimizer.pager.spilled > 0)
torch.save([p.detach() for p in params[:-1]], sys.argv[1] + "/" + sys.argv[3])
"""


def test_a_real_shortage_of_memory(tmp_path):
    """A process whose addresses (ulimit -v) or data (ulimit -d) are limited: state goes to the disk, and the step is
    the same.
    """
    limits = ("free", "RLIMIT_AS", "RLIMIT_DATA")
    command = [sys.executable, "-c", REAL_FAILURE, str(tmp_path), str(Path(tiny.__file__).parent)]
    running = [
        subprocess.Popen([*command, limit], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for limit in limits
    ]
    ended = [process.communicate() for process in running]
    for limit, process, (said, complaint) in zip(limits, running, ended, strict=True):
        assert process.returncode == 0, complaint
        assert said.split() == [str(limit != "free")]
    free, *limited = (torch.load(tmp_path / limit) for limit in limits)
    assert all(same(free, other) for other in limited)


# ---------------------------------------------------------------- a disk that is full


def test_a_full_disk_is_told_before_anything_begins(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk has no room"):
            PagedAdamW(parameters(), memory="none", folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_in_the_middle_is_one_error(tmp_path):
    """An allocation fails, and there is no room to spill to: nothing has moved, and the last checkpoint goes on as if
    nothing had been.
    """
    import resource

    undisturbed, one = OneStep(tmp_path), OneStep(tmp_path)
    save_checkpoint(tmp_path / "out", 1, one.model, one.optimizer, {})
    undisturbed.step()
    before = [p.detach().clone() for p in one.parameters]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with Failing(50), pytest.raises(UserError) as error:
            one.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = error.value.problems
    assert "the disk has no room" in line and same(before, one.parameters)
    two = OneStep(tmp_path)
    load_checkpoint(tmp_path / "out/checkpoints/step-000001", two.model, two.optimizer)
    two.step()
    assert same(two.result()[0], undisturbed.result()[0]) and same(two.result()[1], undisturbed.result()[1])


def test_checkpoints_keep_the_paging(small_pages, tmp_path):
    """Saved and loaded by our checkpoints, with another budget, to the bit."""
    one = OneStep(tmp_path, memory=20_000)
    save_checkpoint(tmp_path / "out", 1, one.model, one.optimizer, {})
    one.step()
    two = OneStep(tmp_path, memory="none")
    torch.manual_seed(99)
    load_checkpoint(tmp_path / "out/checkpoints/step-000001", two.model, two.optimizer)
    assert two.optimizer.pager.resident == 0 < one.optimizer.pager.resident
    two.step()
    assert same(one.result()[0], two.result()[0]) and same(one.result()[1], two.result()[1])
