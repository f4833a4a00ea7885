"""TODO head of optim.layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.optim.pager import fitting
from qlora.sizes import parse_memory

PAGE = 1 << 20  # elements: larger pages have fewer page faults at once, smaller ones fit a budget better
CHUNK = 1 << 17  # elements computed at a time on a CPU: moments, gradient and scratch stay in the cache
BLOCK = 256  # elements that share a scale of the 8-bit state


@dataclass(frozen=True)
class Span:
    """Elements `first` to `first` + `count` of parameter number `index`, at element `at` of a page."""

    index: int
    first: int
    count: int
    at: int


def layout(numels: Sequence[int], block: int = 1) -> list[list[Span]]:
    """Which elements of parameters of these sizes lie in which page. Spans begin at multiples of `block`. A parameter
    that fits a page lies in one; a larger one begins a page and fills as many as it needs.
    """
    pages: list[list[Span]] = [[]]
    used = 0
    for index, numel in enumerate(numels):
        for first in range(0, max(numel, 1), PAGE):  # one without elements has a span too
            count = min(PAGE, numel - first)
            if used + count > PAGE or (numel > PAGE and first == 0 and used):
                pages.append([])
                used = 0
            pages[-1].append(Span(index, first, count, used))
            used += -(-count // block) * block
    return [page for page in pages if page]


def state_bytes(
    numels: Sequence[int], state: str = "float32", memory: int | str = "auto", itemsize: int = 4
) -> tuple[int, int]:
    """(resident, spilled) bytes of the state of parameters of one dtype, of these sizes in the order of the optimizer's
    groups.
    """
    block = BLOCK if state == "8bit" else 1
    sizes = [page_bytes(page_elements(page, block), state, itemsize) for page in layout(numels, block)]
    fits = fitting(sizes, budget_bytes(parse_memory(memory)))
    resident = sum(size for size, fit in zip(sizes, fits, strict=True) if fit)
    return resident, sum(sizes) - resident


def page_elements(page: Sequence[Span], block: int) -> int:
    return page[-1].at + -(-page[-1].count // block) * block


def page_bytes(elements: int, state: str, itemsize: int) -> int:
    return 2 * elements + 2 * 4 * (elements // BLOCK) if state == "8bit" else 2 * elements * itemsize


def budget_bytes(memory: int | str) -> int | None:
    return {"auto": None, "all": None, "none": 0}[memory] if isinstance(memory, str) else memory
