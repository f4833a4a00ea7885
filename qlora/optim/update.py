"""The arithmetic of a step: which elements are updated together, with which numbers, in which memory.

    m = lerp(m, g, 1 - b1)
    v = b2 v + (1 - b2) g^2
    p = (1 - lr decay) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

(arXiv:1711.05101, in the order of operations of torch.optim.AdamW(foreach=False): on a CPU the bits are the same, as
elementwise operations do not depend on where a tensor is cut.) One operation updates a run of many parameters: on a CPU
as many as stay in the cache, on a GPU, where a launch costs more than a copy, the whole page. The alternative, an
operation a parameter, is bound by the number of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora.optim import pages
from qlora.optim.flat import gradient_in_piece
from qlora.optim.moments import Moments, Page, in_memory_order, ordered_as
from qlora.optim.pages import BLOCK, whole_blocks
from qlora_kernels import ops
from qlora_kernels.reference import block_tables


@dataclass(frozen=True)
class Scalars:
    """The numbers of one step for the parameters of a group with the same step count."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # what a parameter is multiplied by
    step_size: float
    correction: float  # what sqrt(v) is divided by
    step: int  # its number, from 1


def scalars_of(group: dict, step: int) -> Scalars:
    """The numbers of step `step` (from 1) for a group of the optimizer."""
    (beta1, beta2), lr = map(float, group["betas"]), float(group["lr"])
    size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return Scalars(beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], size, correction, step)


@dataclass
class Run:
    """Elements `start` to `stop` of a page that are updated together.

    Contiguous parameters or parts of them, and their gradients, each with its place (in elements) in the run.
    """

    scalars: Scalars
    start: int
    stop: int = 0
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def add(self, values: Tensor, gradient: Tensor, at: int) -> None:
        """One more piece, at element `at` of the page."""
        self.parameters.append(values)
        self.gradients.append(gradient)
        self.places.append(at - self.start)


Due = dict[Parameter, tuple[Scalars, Tensor]]  # the parameters that have a gradient, with the numbers of their step


def runs_of(page: Page, due: Due, device: torch.device, block: int) -> list[Run]:
    """What of a page is to be updated, cut where the numbers change, and on a CPU at CHUNK elements. What of parameters
    and gradients lies in one piece, as `flat` has it, is one.
    """
    runs: list[Run] = []
    run, chunk = None, pages.CHUNK if device.type == "cpu" and page.flat is None else pages.PAGE
    begun: tuple[Tensor, int] | None = None  # the piece that a run ends with: sums of the gradients, where it begins
    pieces: dict[int, tuple[Run, Tensor, slice]] = {}  # those of several parameters, by their beginning
    for p, span in page.spans:
        if (found := due.get(p)) is None:
            continue
        scalars, gradient = found
        sums = gradient_in_piece(page, p, span, gradient)
        values, gradient = in_memory_order(p), in_memory_order(ordered_as(gradient, p))
        for first in range(0, span.count, chunk):  # none for a parameter without elements
            count, at = min(chunk, span.count - first), span.at + first
            if run is None or run.scalars is not scalars or run.stop != at or at + count - run.start > chunk:
                run, begun = Run(scalars, at), None
                runs.append(run)
            if begun is not None and begun[0] is sums:
                pieces[begun[1]] = run, begun[0], slice(begun[1], at + whole_blocks(count, block))
            elif count < p.numel():
                part = slice(span.first + first, span.first + first + count)
                run.add(values.view(-1)[part], gradient.view(-1)[part], at)
            else:
                run.add(values, gradient, at)
                begun = None if sums is None else (sums, at)
            run.stop = at + whole_blocks(count, block)
    for run, sums, piece in pieces.values():
        assert page.flat is not None
        number = run.places.index(piece.start - run.start)
        run.parameters[number], run.gradients[number] = page.flat[piece], sums[piece]
    return runs


class Update:
    """The update of runs, in memory that is allocated here, beforehand.

    8-bit moments are decoded to float32, and encoded again.

    Args:
        runs: all that it will be called with.
        scale: what gradients are multiplied by as they are read.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device, eight: bool, scale: float):
        self.eight, self.scale = eight, scale
        longest: dict[torch.dtype, int] = {}
        for run in runs:
            dtype = torch.float32 if eight else run.parameters[0].dtype
            longest[dtype] = max(longest.get(dtype, 0), run.stop - run.start)
        self.work = {dtype: torch.empty(3, n, dtype=dtype, device=device) for dtype, n in longest.items()}
        if eight:
            n = max(longest.values(), default=0)
            self.decoded = torch.empty(2, n, device=device)
            self.integers = torch.empty(n, dtype=torch.int32, device=device)
            for signed in (True, False):
                block_tables(device, signed)  # which are kept

    def __call__(self, run: Run, moments: Moments) -> None:
        n, s = run.stop - run.start, run.scalars
        values = kept = moments.values[:, run.start : run.stop].unbind()
        coded: tuple = ()
        if self.eight:
            values, integers = self.decoded[:, :n].unbind(), self.integers[:n]
            scales = moments.scales[:, run.start // BLOCK : run.stop // BLOCK].unbind()
            coded = tuple(zip(values, kept, scales, (True, False), strict=True))
        for decoded, codes, scale, signed in coded:
            ops.decode_blocks_into(decoded, codes, scale, integers, BLOCK, signed)
        scalars = s.beta1, s.beta2, s.eps, s.decay, s.step_size, s.correction, self.scale
        ops.adamw_(run.parameters, run.gradients, run.places, *values, self.work[values[0].dtype], list(scalars))
        for decoded, codes, scale, signed in coded:
            ops.encode_blocks_into(codes, scale, decoded, integers, BLOCK, signed)
