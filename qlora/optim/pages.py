"""Which elements of which parameter lie in which page, and how many bytes a page takes.

    parameters  | p0 | p1 | p2 ........................ | p3 |       numels, in the order of the optimizer's groups
    pages       [p0 p1] [p2, first PAGE elements] [rest of p2, p3]   spans, each at a multiple of the block size

Pure arithmetic over element counts, so that a plan knows the bytes of an optimizer that does not exist. The
alternative, one page a parameter, has thousands of small pages for an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora.optim.pager import fitting
from qlora.sizes import parse_memory

# Read from this module where they are used, so that one name changes them everywhere.
PAGE = 1 << 20  # elements: larger pages have fewer page faults at once, smaller ones fit a budget better
CHUNK = 1 << 17  # elements computed at a time on a CPU: moments, gradient and scratch stay in the cache
BLOCK = 256  # elements that share a scale of the 8-bit state
FLAT = ("cuda",)  # where parameters and gradients of a page are one piece: where launches are dear

StateKind = Literal["float32", "8bit"]


@dataclass(frozen=True)
class Span:
    """Elements `first` to `first` + `count` of parameter number `index`, at element `at` of a page."""

    index: int
    first: int
    count: int
    at: int


def cut_into_pages(numels: Sequence[int], block: int = 1) -> list[list[Span]]:
    """Which elements of parameters of these sizes lie in which page.

    Spans begin at multiples of `block`. A parameter that fits a page lies in one; a larger one begins a page and fills
    as many as it needs.
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
            used += whole_blocks(count, block)
    return [page for page in pages if page]


def whole_blocks(count: int, block: int) -> int:
    """`count` elements, rounded up to a multiple of `block`."""
    return -(-count // block) * block


def block_of(state: StateKind) -> int:
    """The elements that a span is aligned to."""
    return BLOCK if state == "8bit" else 1


def page_elements(page: Sequence[Span], block: int) -> int:
    """The elements of a page, in whole blocks."""
    return page[-1].at + whole_blocks(page[-1].count, block)


def page_bytes(elements: int, state: StateKind, itemsize: int) -> int:
    """The bytes of two moments of `elements` elements, in the parameter's itemsize or as codes and float32 scales."""
    return 2 * elements + 2 * 4 * (elements // BLOCK) if state == "8bit" else 2 * elements * itemsize


def budget_bytes(memory: int | str) -> int | None:
    """The bytes that may be resident; None for any number of them."""
    return {"auto": None, "all": None, "none": 0}[memory] if isinstance(memory, str) else memory


def state_bytes(
    numels: Sequence[int], state: StateKind = "float32", memory: int | str = "auto", itemsize: int = 4
) -> tuple[int, int]:
    """(resident, spilled) bytes of the state of parameters of one dtype.

    Args:
        numels: their sizes, in the order of the optimizer's groups.
    """
    block = block_of(state)
    sizes = [page_bytes(page_elements(page, block), state, itemsize) for page in cut_into_pages(numels, block)]
    fits = fitting(sizes, budget_bytes(parse_memory(memory)))
    resident = sum(size for size, fit in zip(sizes, fits, strict=True) if fit)
    return resident, sum(sizes) - resident


def waiting_bytes(numels: Sequence[int], state: StateKind, layers: int, magnitudes: bool, itemsize: int = 4) -> int:
    """The most bytes that gradients of one micro-batch take beside their sums, where pages are FLAT.

    They wait until their page is complete: those of the layer under way, and a page that it shares with the layer
    before; `magnitudes` lie behind all other parameters, and share one more.

    Args:
        numels: as in `state_bytes`, of `layers` layers.
    """
    block = block_of(state)
    made = cut_into_pages(numels, block)
    flat = [page for page in made if all(span.count == numels[span.index] for span in page)]
    sizes = sorted((page_elements(page, block) * itemsize for page in flat), reverse=True)
    return min(sum(sizes), sum(numels) * itemsize // layers + sum(sizes[: 1 + magnitudes]))
