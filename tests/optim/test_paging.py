"""The pager: what is resident and what is not, that nothing is lost on the way, and that everything goes back."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest
import torch

from qlora.errors import UserError
from qlora.optim.disk_tier import in_memory
from qlora.optim.memory_errors import out_of_memory
from qlora.optim.pager import Pager, fitting
from qlora.train.memory import anonymous_memory

MB = 1 << 20


def handles(folder: Path) -> list[int]:
    """The handles of files in `folder` that this process has open."""
    return [
        int(link.name)
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink() and str(folder) in os.readlink(link)
    ]


def mapped(folder: Path) -> int:
    """How many mappings of files in `folder` this process has."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fill(pager: Pager, seed: int = 0) -> list[torch.Tensor]:
    """Write random bytes into every page; returns copies of them."""
    generator, order, expected = torch.Generator().manual_seed(seed), range(len(pager.pages())), []
    with pager.sequence(order) as pages:
        for page in pages:
            expected.append(torch.randint(0, 256, page.shape, dtype=torch.uint8, generator=generator))
            page.copy_(expected[-1])
    return expected


def same(pager: Pager, expected: list[torch.Tensor]) -> bool:
    with pager.sequence(range(len(expected))) as pages:
        walked = all(torch.equal(page, wanted) for page, wanted in zip(pages, expected, strict=True))
    return walked and all(torch.equal(page, wanted) for page, wanted in zip(pager.pages(), expected, strict=True))


def test_fitting():
    """In order, each page that still fits."""
    assert fitting([4, 4, 4], None) == [True, True, True]
    assert fitting([4, 4, 4], 8) == [True, True, False]
    assert fitting([4, 9, 4, 1], 8) == [True, False, True, False]
    assert fitting([4], 0) == [False]


SIZES = [5000, 4096, 1, 3 * MB, 70_001]


@pytest.mark.parametrize("budget", [None, 0, 9096, 9097, 3 * MB + 10_000, sum(SIZES)])
def test_pages_keep_their_bytes(tmp_path, budget):
    pager = Pager(budget=budget, folder=tmp_path)
    assert pager.add(SIZES) == range(5)
    resident = sum(size for size, fits in zip(SIZES, fitting(SIZES, budget), strict=True) if fits)
    assert (pager.resident, pager.spilled) == (resident, sum(SIZES) - resident)
    assert all(not page.any() for page in pager.pages())
    before = pager.moved
    expected = fill(pager)
    assert pager.moved - before == 2 * pager.spilled
    assert same(pager, expected)
    assert pager.add([100, MB]) == range(5, 7)  # the file grows
    assert same(pager, [*expected, torch.zeros(100, dtype=torch.uint8), torch.zeros(MB, dtype=torch.uint8)])
    with pager.sequence([3, 0]) as pages:
        assert [torch.equal(page, expected[i]) for page, i in zip(pages, [3, 0], strict=True)] == [True, True]
    pager.close()


def test_what_was_written_before_an_exception_stays(tmp_path):
    pager = Pager(budget=0, folder=tmp_path)
    pager.add([MB] * 3)
    with pytest.raises(KeyError), pager.sequence([0, 1, 2]) as pages:
        for number, page in enumerate(pages):
            page.fill_(number + 1)
            if number == 1:
                del page
                raise KeyError
    assert [page[0].item() for page in pager.pages()] == [1, 2, 0]
    pager.close()


def test_eviction(tmp_path):
    """The last pages go first, the bytes stay, and memory and addresses are given back."""
    pager = Pager(folder=tmp_path)
    pager.add([16 * MB] * 4)
    expected = fill(pager)
    memory, addresses = anonymous_memory(), address_space()
    assert pager.evict(20 * MB) == 32 * MB
    assert (pager.resident, pager.spilled) == (32 * MB, 32 * MB)
    assert memory - anonymous_memory() > 31 * MB and addresses - address_space() > 31 * MB
    assert same(pager, expected)
    pager.add([16 * MB])  # memory that was given up is not taken again
    assert pager.resident == 32 * MB
    assert pager.evict(10**9) == 32 * MB and pager.evict(1) == 0
    assert same(pager, [*expected, torch.zeros(16 * MB, dtype=torch.uint8)])
    pager.close()


def test_the_file_is_preallocated_and_has_no_name(tmp_path):
    pager = Pager(budget=0, folder=tmp_path)
    pager.add([8 * MB] * 2)
    assert list(tmp_path.iterdir()) == []
    (handle,) = handles(tmp_path)
    status = os.fstat(handle)
    assert status.st_size == 16 * MB and status.st_blocks * 512 >= 16 * MB and status.st_nlink == 0
    pager.close()


@pytest.mark.parametrize("end", ["close", "forget", "exception"])
def test_everything_goes_back(tmp_path, end):
    before = anonymous_memory()

    def use() -> None:
        pager = Pager(budget=32 * MB, folder=tmp_path)
        pager.add([8 * MB] * 8)
        with pager.sequence(range(8)) as pages:
            for page in pages:
                page.fill_(1)
        scratch = pager.scratch(MB).fill_(1)
        assert handles(tmp_path) and mapped(tmp_path) and anonymous_memory() - before > 30 * MB
        del scratch
        if end == "close":
            pager.close()
        if end == "exception":
            try:
                with pager.sequence(range(8)) as pages:
                    next(pages)
                    raise RuntimeError("out of ideas")
            finally:
                pager.close()

    if end == "exception":
        with pytest.raises(RuntimeError, match="out of ideas"):
            use()
    else:
        use()
    gc.collect()
    assert (handles(tmp_path), mapped(tmp_path), list(tmp_path.iterdir())) == ([], 0, [])
    assert anonymous_memory() - before < 4 * MB


def test_a_page_that_is_being_read_outlives_its_pager(tmp_path):
    pager = Pager(budget=0, folder=tmp_path)
    pager.add([MB])
    expected = fill(pager)
    (page,) = pager.pages()
    pager.close()
    assert torch.equal(page, expected[0])


def test_a_cold_file_is_a_stall(tmp_path):
    pager = Pager(budget=0, folder=tmp_path)
    pager.add([4 * MB])
    expected = fill(pager)
    assert same(pager, expected)
    warm = pager.stalls
    assert same(pager, expected) and pager.stalls == warm
    assert (
        pager.evict(0) == 4 * MB and pager.evict(0) == 0
    )  # the addresses of the mapping, which would keep the file in the cache
    assert same(pager, expected) and mapped(tmp_path) == 0 and pager.stalls == warm
    (handle,) = handles(tmp_path)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    assert same(pager, expected) and pager.stalls > warm
    pager.close()


def test_a_full_disk_is_one_error_and_nothing_moves(tmp_path):
    pager, spilled = Pager(folder=tmp_path), Pager(budget=0, folder=tmp_path)
    pager.add([MB] * 4)
    expected = fill(pager)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MB, limits[1]))
    try:
        for act in (lambda: spilled.add([MB] * 4), lambda: pager.evict(4 * MB)):
            with pytest.raises(UserError) as error:
                act()
            assert len(error.value.problems) == 1 and "the disk has no room for 4 MB" in error.value.problems[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (spilled.resident, spilled.spilled, pager.resident, pager.spilled) == (0, 0, 4 * MB, 0)
    assert same(pager, expected)
    pager.close(), spilled.close()


def test_folders_that_will_not_do(tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            Pager(budget=0, folder=folder).add([1])
        return str(error.value)

    assert "No such file" in refused(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(tmp_path / "file")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tmpfs = [mount[1] for mount in mounts if mount[2] == "tmpfs" and os.access(mount[1], os.W_OK)]
    assert all(in_memory(Path(folder)) for folder in tmpfs) and not in_memory(tmp_path)
    for folder in tmpfs[:1]:
        assert "lies in memory" in refused(Path(folder))


def test_failed_allocations_are_known():
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(1 << 60)
    with pytest.raises(MemoryError) as python_error:
        bytearray(1 << 62)
    assert out_of_memory(torch_error.value) and out_of_memory(python_error.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not out_of_memory(
        ValueError("memory")
    )


def test_a_forked_child_cannot_touch_the_pages_of_its_parent(tmp_path):
    """The file is shared: a step of the child would change the parent's moments. What is resident is a copy."""
    import os

    from qlora.errors import UserError

    pager, resident = Pager(budget=0, folder=tmp_path), Pager(folder=tmp_path)
    pager.add([MB] * 2), resident.add([MB])

    def touches() -> bool:
        refused = 0
        for act in (lambda: pager.sequence([0]).__enter__(), pager.pages, lambda: pager.add([MB])):
            try:
                act()
            except UserError as error:
                refused += "of which this one is a forked child" in str(error)
        with resident.sequence([0]) as pages:
            next(pages)[0] = 7  # one element: a forked child has no threads for more
        return refused == 3

    child = os.fork()
    if child == 0:
        os._exit(0 if touches() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with resident.sequence([0]) as pages:
        assert int(next(pages).sum()) == 0
    with pager.sequence([0, 1]) as pages:
        assert sum(int(page.sum()) for page in pages) == 0
    pager.close(), resident.close()
