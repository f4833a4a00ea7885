"""Parameters and gradients of a page in one piece each, on a card: all of the page is then updated by one launch.

    parameters  [p0 | p1 | p2 ...]    views of one tensor, at the elements where their moments lie in the page
    gradients   [g0 | g1 | g2 ...]    the sums over the micro-batches of a step, laid out alike

torch launches once for each parameter to add a micro-batch's gradient to the one before. Here each micro-batch makes
gradients of its own, and as soon as those of a page are all there one launch copies them to the sums, or adds them, and
they go: at most two pages of them are there at once. The bits are those of adding one by one. The alternatives:
gradients that are views from the start are added to by a launch each; a kernel over a table of pointers (torch's fused
AdamW) needs the table made and sent at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora.optim.memory_errors import ALLOCATION_ERRORS, out_of_memory
from qlora.optim.moments import Page
from qlora.optim.pages import Span

ALIGNED = 16  # bytes: what kernels load at a time, and assume of the addresses of A and B


@torch.no_grad()
def lay_out(page: Page) -> None:
    """Move the parameters of a page into one tensor, `page.flat`; their values and shapes stay.

    Left as they are: a page with a part of a parameter, or with an address that is no multiple of 16; all, where there
    is no memory for it.
    """
    size = page.dtype.itemsize
    if not all(span.count == p.numel() and span.at * size % ALIGNED == 0 for p, span in page.spans):
        return
    try:
        flat = torch.zeros(page.elements, dtype=page.dtype, device=page.spans[0][0].device)
    except ALLOCATION_ERRORS as error:
        if not out_of_memory(error):
            raise
        return
    for p, span in page.spans:
        p.data = _part(flat, p, span).copy_(p)
    page.flat = flat


def _part(flat: Tensor, p: Parameter, span: Span) -> Tensor:
    """The elements of `span` in the shape and order of its parameter."""
    return flat.as_strided(p.shape, p.stride(), span.at)


def gradient_in_piece(page: Page, p: Parameter, span: Span, gradient: Tensor) -> Tensor | None:
    """All sums of a page if `gradient` is the part of `p` in them and p still its part of `page.flat`, else None."""
    flat, sums = page.flat, gradient._base
    if flat is None or sums is None or p.data_ptr() != flat.data_ptr() + span.at * page.dtype.itemsize:
        return None
    alike = sums.shape == flat.shape and sums.dtype == flat.dtype and gradient.stride() == p.stride()
    return sums if alike and gradient.storage_offset() == span.at else None


class GradientSums:
    """The gradients of a step by page. Between `__init__` and `finish` a parameter's `grad` is that of the micro-batch
    under way alone; afterwards it is a view of the sums.
    """

    def __init__(self, pages: Sequence[Page]):
        self._pages = [page for page in pages if page.flat is not None]
        self._waiting = list(self._pages)  # those whose gradients of this micro-batch are not all there
        self._sums: dict[int, Tensor] = {}  # by page
        self._parts: dict[Parameter, Tensor] = {}  # of parameters that have had a gradient

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While entered, a page's gradients are taken as soon as they are there: asked whenever that of the page's
        first parameter comes, which a backward pass makes last.
        """
        hooks = [page.spans[0][0].register_post_accumulate_grad_hook(self._arrived) for page in self._pages]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _arrived(self, first: Tensor) -> None:
        complete = [page for page in self._waiting if all(p.grad is not None for p, _ in page.spans)]
        for page in complete:
            self._take(page)
        self._waiting = [page for page in self._waiting if page not in complete]

    def end_micro_batch(self) -> None:
        """Take what is left, also of pages of which some parameters got no gradient."""
        for page in self._waiting:
            self._take(page)
        self._waiting = list(self._pages)

    def finish(self) -> None:
        """Give each parameter the sum of its gradients."""
        for p, part in self._parts.items():
            p.grad = part

    @torch.no_grad()
    def _take(self, page: Page) -> None:
        first: tuple[list[Tensor], list[Tensor]] = ([], [])  # (parts of the sums, gradients)
        further: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p, span in page.spans:
            gradient = p.grad
            if gradient is None or gradient.layout != torch.strided:
                continue
            known = p in self._parts
            if not known:
                if id(page) not in self._sums:
                    assert page.flat is not None
                    self._sums[id(page)] = torch.zeros_like(page.flat)  # gaps share scales
                self._parts[p] = _part(self._sums[id(page)], p, span)
            for group, tensor in zip(further if known else first, (self._parts[p], gradient), strict=True):
                group.append(tensor)
            p.grad = None
        if first[0]:
            torch._foreach_copy_(*first)
        if further[0]:
            torch._foreach_add_(*further)
