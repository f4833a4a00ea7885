"""Memory of the native operators' large results (csrc/allocator.cpp)."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
import torch

from qlora.train.memory import anonymous_memory, return_freed_memory
from qlora_kernels import backends, ops
from qlora_kernels.cpu.binding import LARGE

MB = 1 << 20


def in_use() -> int:
    assert backends.NATIVE is not None
    return backends.NATIVE.library.qlora_memory_in_use()


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return backends.empty(*shape, like=torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_result_is_a_tensor_as_any(dtype):
    before, least = in_use(), LARGE // dtype.itemsize
    assert made(least - 1, dtype=dtype).nbytes < LARGE and in_use() == before
    x = made(3, least // 2, 1, dtype=dtype)
    assert (x.shape, x.dtype, x.device.type) == ((3, least // 2, 1), dtype, "cpu")
    assert x.is_contiguous() and x.data_ptr() % 4096 == 0 and not x.requires_grad
    assert before + x.nbytes <= in_use() < before + x.nbytes + 65536  # whole pages
    x.fill_(2)
    part, copied = x[1:, 5:].view(2, -1), x.clone()
    del x
    assert in_use() > before and part.eq(2).all() and copied.sum(dtype=torch.float64) == 2 * copied.numel()
    del part
    assert in_use() == before


def test_operators_put_their_results_there():
    before = in_use()
    gate, up = torch.randn(256, 512), torch.randn(256, 512)
    y = ops.swiglu(gate, up)
    assert in_use() == before + y.nbytes
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * up)
    at = y.data_ptr()
    del y
    assert in_use() == before and ops.swiglu(gate, up).data_ptr() == at  # the next one of its size has its place


def test_gradients_flow_through_it():
    x = made(512, 256).normal_().requires_grad_()
    y = (x * x).sum()
    y.backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * x.detach())


def test_results_keep_to_their_own_memory():
    """Hundreds of sizes come and go in any order, by two threads; none ever touches another."""
    before, errors = in_use(), []

    def work(seed: int) -> None:
        chance, held = random.Random(seed), []
        for step in range(400):
            if len(held) > 12 or (held and chance.random() < 0.45):
                number, x = held.pop(chance.randrange(len(held)))
                if not x.eq(number).all():
                    errors.append((seed, step))
            else:
                number = seed * 1000 + step
                held.append((number, made(chance.randrange(1, 9), chance.randrange(70_000, 200_000)).fill_(number)))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and in_use() == before


def test_freed_memory_goes_back_when_asked():
    x = made(16 * MB).fill_(1)
    full = anonymous_memory()
    del x
    assert full - anonymous_memory() < 4 * MB  # kept for the next
    return_freed_memory()
    assert full - anonymous_memory() > 60 * MB
    assert made(16 * MB).fill_(3).eq(3).all()


def test_torch_fills_what_it_is_to_fill():
    """With deterministic algorithms torch fills new memory, so that what nobody has written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert made(256, 1024).isnan().all()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


JOINED = """
import torch
from qlora_kernels import backends
like = torch.empty(0)
results = [backends.empty(1 << 20, like=like) for _ in range(16)]
places = [x.data_ptr() for x in results]
assert places == [places[0] + (i << 22) for i in range(16)]  # side by side in a new process
for at in (3, 0, 7, 1, 2, *range(4, 15)):  # first alone, then beside free ones before, behind and on either side
    results[at] = None
assert backends.empty(15 << 20, like=like).data_ptr() == places[0]
results.append(backends.empty(17 << 20, like=like))  # larger than what is free
assert results[-1].data_ptr() == places[15] + (1 << 22)
small, large = backends.empty(1 << 20, like=like), backends.empty(14 << 20, like=like)
assert (small.data_ptr(), large.data_ptr()) == (places[0], places[1])
results = large = None
assert backends.empty(8 << 20, like=like).data_ptr() == places[1]
"""

LIMITED = """
import resource
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (12 << 30)
import torch
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from qlora_kernels import backends
x = backends.empty(1 << 20, like=torch.empty(0)).fill_(1)
assert backends.NATIVE.library.qlora_memory_in_use() == 0 and x.sum() == 1 << 20
"""

FORKED = """
import os, torch
from qlora_kernels import backends
torch.set_num_threads(1)  # a child has none of torch's threads, and would wait for them
kept = backends.empty(1 << 20, like=torch.empty(0)).fill_(1)
child = os.fork()
more = backends.empty(1 << 20, like=torch.empty(0)).fill_(2)
kept.add_(more) if child == 0 else None
assert kept.eq(3 if child == 0 else 1).all() and more.eq(2).all()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
leaves = more  # alive when the interpreter ends
"""


@pytest.mark.parametrize("code", [JOINED, LIMITED, FORKED], ids=["joined", "ulimit -v", "fork"])
def test_processes(code):
    """What is free side by side is one piece. Under a limit on addresses results are torch's own. A fork has a copy."""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=120)
