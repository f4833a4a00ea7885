"""The two moments of every parameter, kept in the pages of a `Pager`.

    float32   m [n] | v [n]                                       in the parameter's dtype, as torch keeps them
    8bit      codes of m [n] | of v [n] | absmax of m [n/256] | of v [n/256]       n counts whole blocks of 256

(8-bit state: arXiv:2110.02861.) A page holds parameters of one dtype, first all m, then all v. The elements of a tensor
lie in the order of its parameter's memory, so a transposed parameter is not copied. The alternative, a moment tensor a
parameter, cannot be paged in large pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora.errors import UserError, problem
from qlora.optim.pager import Pager
from qlora.optim.pages import BLOCK, Span, StateKind, block_of, budget_bytes, cut_into_pages, page_bytes, page_elements


@dataclass(eq=False)
class Page:
    """What a page holds: spans by parameter, in order, and the dtype of the parameters; `flat` [elements]: what the
    parameters are views of, where `flat.lay_out` has made them so.
    """

    dtype: torch.dtype
    elements: int
    spans: list[tuple[Parameter, Span]]
    flat: Tensor | None = None

    def in_piece(self) -> list[Parameter]:
        """The parameters that are views of `flat`, whose versions do not count what is written there."""
        return [] if self.flat is None else [p for p, _ in self.spans]


@dataclass
class Moments:
    """Row 0 of each tensor belongs to m, row 1 to v.

    `values` [2, n] are the moments, or their 8-bit codes; `scales` [2, n / 256] the maxima of the blocks of codes
    (empty, [2, 0], for moments that are no codes).
    """

    values: Tensor
    scales: Tensor


class PagedMoments:
    """The moments of parameters on one device, in pages of which those over the budget are spilled.

    Raises:
        UserError: a parameter on another device, or one that is no dense tensor of floating-point numbers.
    """

    def __init__(self, parameters: Iterable[Parameter], state: StateKind, memory: int | str, folder: str | Path | None):
        new = list(dict.fromkeys(parameters))
        self.state, self.block = state, block_of(state)
        self.pages: list[Page] = []
        self.spans: dict[Parameter, list[tuple[int, Span]]] = {}  # parameter -> its (page, span)s
        device = new[0].device if new else torch.device("cpu")
        _refuse_misfits(new, device)
        self.pager = Pager(device, budget=budget_bytes(memory), folder=folder, spill=memory != "all")
        self.add(new)

    def add(self, parameters: Iterable[Parameter]) -> None:
        """Give parameters that have no place yet one in new pages of zeros."""
        new = [p for p in dict.fromkeys(parameters) if p not in self.spans]
        _refuse_misfits(new, self.pager.device)
        pages = pages_of(new, self.block)
        numbers = self.pager.add([page_bytes(page.elements, self.state, page.dtype.itemsize) for page in pages])
        self.spans |= {p: [] for p in new}
        for number, page in zip(numbers, pages, strict=True):
            for p, span in page.spans:
                self.spans[p].append((number, span))
        self.pages += pages

    def view(self, memory: Tensor, number: int) -> Moments:
        """The moments in `memory`, the uint8 tensor of page `number`."""
        page = self.pages[number]
        n = page.elements
        if self.state == "float32":
            values = memory.view(page.dtype).view(2, n)
            return Moments(values, values[:, :0])
        return Moments(memory[: 2 * n].view(2, n), memory[2 * n :].view(torch.float32).view(2, n // BLOCK))


def pages_of(parameters: Iterable[Parameter], block: int) -> list[Page]:
    """Pages for these, without memory. `block`: the elements that a span is aligned to."""
    pages = []
    for dtype, members in groupby(sorted(parameters, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
        together = list(members)
        for spans in cut_into_pages([p.numel() for p in together], block):
            pages.append(Page(dtype, page_elements(spans, block), [(together[span.index], span) for span in spans]))
    return pages


def blocks_of(span: Span) -> slice:
    """The scales of a span's elements in its page."""
    return slice(span.at // BLOCK, span.at // BLOCK + -(-span.count // BLOCK))


def _refuse_misfits(parameters: list[Parameter], device: torch.device) -> None:
    problems = []
    for p in parameters:
        if p.device != device:
            rule = f"another parameter lies on {device}"
            problems.append(problem("device", p.device, rule, "Use an optimizer for each device"))
        if not p.is_floating_point() or p.layout != torch.strided or not _is_dense(p):
            rule = "must be dense tensors of floating-point numbers"
            problems.append(problem("params", tuple(p.shape), rule, "Leave it out"))
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def _is_dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_memory_order(t: Tensor) -> Tensor:
    """A contiguous view of the elements in the order of memory."""
    return t if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def ordered_as(value: Tensor, p: Parameter) -> Tensor:
    """A gradient or moment with its elements in the order of its parameter's."""
    same = (value.is_contiguous() and p.is_contiguous()) or value.stride() == p.stride()
    return value if same else torch.empty_like(p, dtype=value.dtype).copy_(value)
