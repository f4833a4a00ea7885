"""AdamW whose state lies in pages: what does not fit a budget spills (`paging.py`), small tensors included.

    m = lerp(m, g, 1 - b1)    v = b2 v + (1 - b2) g^2    p = (1 - lr decay) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

(arXiv:1711.05101, in the order of operations of torch.optim.AdamW(foreach=False), so that the bits are the same on a
CPU: elementwise
operations do not depend on where a tensor is cut.) A page holds the moments of a run of parameters, first all m, then
all v:

    float32   m [n] | v [n]                                       in the parameter's dtype, as torch keeps them
    8bit      codes of m [n] | of v [n] | absmax of m [n/256] | of v [n/256]       n counts whole blocks of 256 (arXiv:2110.02861)

One operation serves many parameters of a page: on a CPU as many as stay in the cache, on a GPU, where launching costs
more than copying, the whole page. A step allocates all that it needs before it changes anything: an allocation that
fails leaves parameters and state as they were. The alternative, a state of tensors that are each paged on demand, pages
no small tensor and loses its paging in load_state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora.errors import UserError, problem
from qlora.optim.layout import BLOCK, CHUNK, PAGE, Span, budget_bytes, layout, page_bytes, page_elements
from qlora.optim.pager import Pager
from qlora.sizes import parse_memory
from qlora_kernels import ops
from qlora_kernels.reference import block_tables


@dataclass
class Page:
    """What a page holds: spans by parameter, in order, and the dtype of the parameters."""

    dtype: torch.dtype
    elements: int
    spans: list[tuple[Parameter, Span]]


@dataclass(frozen=True)
class Scalars:
    """The numbers of one step for the parameters of a group with the same step count."""

    beta1: float
    beta2: float
    eps: float
    decay: float  # what a parameter is multiplied with
    step_size: float
    correction: float  # what sqrt(v) is divided by
    step: int  # its number, from 1


@dataclass
class Run:
    """Elements `start` to `stop` of a page that are updated together: contiguous parameters or parts of them, and their
    gradients, each with its place in the run.
    """

    scalars: Scalars
    start: int
    stop: int = 0
    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


Due = dict[Parameter, tuple[Scalars, Tensor]]  # the parameters that have a gradient, with the numbers of their step
Prepared = tuple[Due, list[tuple[int, list[Run]]]]  # see PagedAdamW.prepare


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with a budget for its state. `memory` is what of it may lie on the parameters' device:
    bytes, a text such as "200MB", "none", "all" (never spill), or "auto": all of it until an allocation fails, see
    `make_room`. The rest lies in a file in `folder` (CPU; by default the system's folder for temporary files) or in
    pinned host memory (CUDA).

    `state` "float32" keeps two moments in each parameter's dtype, float32 for float32; the updates are those of
    torch.optim.AdamW(foreach=False), to the bit on a CPU, whatever the budget. "8bit" keeps them in blocks of 256 that
    share a scale.

    `state_dict` has torch's form; its tensors are the state itself, not a copy, and what is spilled stays so. `pager`
    counts resident, spilled and moved bytes. `close` gives everything back; so does dropping the last reference.

    Raises:
        UserError: everything that is wrong with the arguments; no room for what is to be spilled.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        memory: int | str = "auto",
        state: Literal["float32", "8bit"] = "float32",
        folder: str | Path | None = None,
    ):
        problems = [
            problem(name, value, f"must be {rule}", "Correct it")
            for name, value, right, rule in (
                ("lr", lr, float(lr) >= 0, "at least 0"),
                (
                    "betas",
                    betas,
                    len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
                    "two numbers from 0 to below 1",
                ),
                ("eps", eps, eps >= 0, "at least 0"),
                ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
                ("state", state, state in ("float32", "8bit"), "float32 or 8bit"),
            )
            if not right
        ]
        try:
            self.memory = parse_memory(memory)
        except ValueError as error:
            problems.append(problem("memory", memory, str(error), "Give for example 200MB"))
        if problems:
            raise UserError(problems)
        self.pager: Pager | None = None
        self._kind, self._folder, self._block = state, folder, BLOCK if state == "8bit" else 1
        self._pages: list[Page] = []
        self._spans: dict[Parameter, list[tuple[int, Span]]] = {}
        self._steps: dict[Parameter, int] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._place(p for p in self._parameters() if p.requires_grad)

    def _parameters(self) -> Iterator[Parameter]:
        return (p for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.pager is not None:  # not while the first groups are being added
            self._place(p for p in self.param_groups[-1]["params"] if p.requires_grad)

    def _place(self, parameters: Iterable[Parameter]) -> None:
        """Give parameters their place in pages of zeros."""
        new = [p for p in dict.fromkeys(parameters) if p not in self._spans]
        device = self.pager.device if self.pager is not None else new[0].device if new else torch.device("cpu")
        problems = []
        for p in new:
            if p.device != device:
                problems.append(
                    problem(
                        "device", p.device, f"another parameter lies on {device}", "Use an optimizer for each device"
                    )
                )
            if not p.is_floating_point() or p.layout != torch.strided or not _dense(p):
                problems.append(
                    problem("params", tuple(p.shape), "must be dense tensors of floating-point numbers", "Leave it out")
                )
        if problems:
            raise UserError(list(dict.fromkeys(problems)))
        if self.pager is None:
            self.pager = Pager(
                device, budget=budget_bytes(self.memory), folder=self._folder, spill=self.memory != "all"
            )
        pages = []
        for dtype, members in groupby(sorted(new, key=lambda p: str(p.dtype)), key=lambda p: p.dtype):
            together = list(members)
            for spans in layout([p.numel() for p in together], self._block):
                pages.append(
                    Page(dtype, page_elements(spans, self._block), [(together[span.index], span) for span in spans])
                )
        numbers = self.pager.add([page_bytes(page.elements, self._kind, page.dtype.itemsize) for page in pages])
        self._spans |= {p: [] for p in new}
        for number, page in zip(numbers, pages, strict=True):
            for p, span in page.spans:
                self._spans[p].append((number, span))
        self._pages += pages

    # ---------------------------------------------------------------- a step

    @torch.no_grad()
    def prepare(self) -> Prepared:
        """What `step` does first, which needs no value of a gradient. Of a 7B it takes milliseconds: time that a GPU
        spends on the gradients if `step` gets it from here, and waiting if not. Good for the next step, with the
        gradients and rates that there are.
        """
        self._open()
        due = self._due()
        return due, [(number, runs) for number, page in enumerate(self._pages) if (runs := self._runs(page, due))]

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, prepared: Prepared | None = None, scale: float = 1.0
    ) -> Any:
        """Update every parameter that has a gradient; returns the loss of `closure`, if given. `prepared`: from
        `prepare`. Gradients are multiplied by `scale` as they are read, and stay as they are: doing it before would
        pass over them once more.

        Raises:
            MemoryError, torch.OutOfMemoryError, RuntimeError, OSError: an allocation failed (`paging.out_of_memory`
            tells). Nothing
                has changed then, and the step can be taken again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, work = self.prepare() if prepared is None or closure is not None else prepared
        with self.pager.sequence([number for number, _ in work]) as pages:
            update = _Update([run for _, runs in work for run in runs], self.pager.device, self._kind == "8bit", scale)
            # From here on nothing is allocated: what begins ends.
            for (number, runs), page in zip(work, pages, strict=True):
                moments = self._moments(page, self._pages[number])
                for run in runs:
                    update(run, moments)
        self._steps |= {p: scalars.step for p, (scalars, _) in due.items()}
        return loss

    def _open(self) -> None:
        if self.pager is None or self.pager.closed:
            raise UserError(
                problem("optimizer", "PagedAdamW", "was closed and has no state any more", "Make a new one")
            )

    def _due(self) -> Due:
        due: Due = {}
        device = self.pager.device
        for group in self.param_groups:
            (beta1, beta2), lr = map(float, group["betas"]), float(group["lr"])
            known: dict[int, Scalars] = {}
            for p in group["params"]:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise UserError(
                        problem("params", tuple(p.shape), "has a sparse gradient", "Make its layer with sparse=False")
                    )
                if p.device != device:
                    remedy = "Make the optimizer after moving the model"
                    raise UserError(
                        problem("device", p.device, f"the optimizer was made for parameters on {device}", remedy)
                    )
                step = self._steps.get(p, 0) + 1
                if step not in known:
                    size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
                    known[step] = Scalars(
                        beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], size, correction, step
                    )
                due[p] = known[step], gradient
        self._place(due)
        return due

    def _runs(self, page: Page, due: Due) -> list[Run]:
        """What of a page is to be updated, cut where the numbers change, and on a CPU at CHUNK elements."""
        runs: list[Run] = []
        run, chunk = None, CHUNK if self.pager.device.type == "cpu" else PAGE
        for p, span in page.spans:
            if (found := due.get(p)) is None:
                continue
            scalars, gradient = found
            values, gradient = _contiguous(p), _contiguous(_like(gradient, p))
            for first in range(0, span.count, chunk):  # none for a parameter without elements
                count, at = min(chunk, span.count - first), span.at + first
                if run is None or run.scalars is not scalars or run.stop != at or at + count - run.start > chunk:
                    run = Run(scalars, at)
                    runs.append(run)
                parts = values, gradient
                if count < p.numel():
                    parts = (x.view(-1)[span.first + first : span.first + first + count] for x in parts)
                for pieces, part in zip((run.parameters, run.gradients), parts, strict=True):
                    pieces.append(part)
                run.places.append(at - run.start)
                run.stop = at + -(-count // self._block) * self._block
        return runs

    def _moments(self, memory: Tensor, page: Page) -> Moments:
        n = page.elements
        if self._kind == "float32":
            return Moments(memory.view(page.dtype).view(2, n))
        return Moments(memory[: 2 * n].view(2, n), memory[2 * n :].view(torch.float32).view(2, n // BLOCK))

    # ---------------------------------------------------------------- memory

    def make_room(self) -> bool:
        """An allocation failed: move half of the resident pages (at least one) to the slow tier, for good. False if
        nothing is left to give up, or with memory="all". What is computed does not change.
        """
        self._open()
        return self.pager.evict(-(-self.pager.resident // 2)) > 0 if self.memory != "all" else False

    def close(self) -> None:
        """Give all memory and files back. The optimizer cannot be used any more."""
        if self.pager is not None:
            self.pager.close()

    def __reduce_ex__(self, protocol):  # copy.deepcopy comes here too
        rule = "owns memory and a file, of which there is no copy"
        raise UserError(problem("optimizer", "PagedAdamW", rule, "Take its state_dict(), and load that into a new one"))

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """torch's form: `step`, `exp_avg`, `exp_avg_sq` by parameter; for 8-bit state the codes, and `exp_avg_absmax`,
        `exp_avg_sq_absmax` [blocks]. No copy of the state is made in memory: a later step changes what is returned."""
        self._open()
        memory = self.pager.pages()
        for p, step in self._steps.items():
            entry = {"step": torch.tensor(float(step))}
            parts = [(self._moments(memory[number], self._pages[number]), span) for number, span in self._spans[p]]
            for k, name in enumerate(("exp_avg", "exp_avg_sq")):
                values = self._joined([moments.values[k, span.at : span.at + span.count] for moments, span in parts])
                entry[name] = values.as_strided(p.shape, p.stride())
                if self._kind == "8bit":
                    entry[f"{name}_absmax"] = self._joined(
                        [moments.scales[k, _blocks(span)] for moments, span in parts]
                    )
            self.state[p] = entry
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        count = sum(part.numel() for part in parts)
        result = self.pager.scratch(count * parts[0].element_size()).view(parts[0].dtype)
        for part, place in zip(parts, result.split([part.numel() for part in parts]), strict=True):
            place.copy_(part)
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or, for float32 state, of torch.optim.AdamW. The values go into the
        pages, wherever those lie.

        Raises:
            UserError: everything about it that does not fit; nothing has been changed then.
        """
        self._open()
        groups = state_dict["param_groups"]
        problems = []
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            rule = f"has groups of {[len(g['params']) for g in groups]} parameters, not {[len(g['params']) for g in self.param_groups]}"
            raise UserError(problem("state_dict", "(groups)", rule, "Make the optimizer with the same groups"))
        for option in ("amsgrad", "maximize"):
            if any(group.get(option) for group in groups):
                problems.append(
                    problem("state_dict", option, "is nothing that PagedAdamW does", "Use torch.optim.AdamW for it")
                )
        keys = [index for group in groups for index in group["params"]]
        saved = {
            p: state_dict["state"][key]
            for key, p in zip(keys, self._parameters(), strict=True)
            if state_dict["state"].get(key)
        }
        for number, (p, entry) in enumerate(saved.items()):
            problems += self._misfits(number, p, entry)
        if problems:
            raise UserError(problems)
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._place(saved)
        self._steps = {p: int(entry["step"]) for p, entry in saved.items()}
        flat = {
            p: {name: _contiguous(_like(entry[name], p)).view(-1) for name in ("exp_avg", "exp_avg_sq")}
            for p, entry in saved.items()
        }
        with self.pager.sequence(range(len(self._pages))) as pages:
            for page, memory in zip(self._pages, pages, strict=True):
                moments = self._moments(memory, page)
                for p, span in page.spans:
                    for k, name in enumerate(("exp_avg", "exp_avg_sq")):
                        values = moments.values[k, span.at : span.at + span.count]
                        scales = moments.scales[k, _blocks(span)] if moments.scales is not None else None
                        if p not in saved:
                            values.zero_()
                            if scales is not None:
                                scales.zero_()
                            continue
                        values.copy_(flat[p][name][span.first : span.first + span.count])
                        if scales is not None:
                            moments.values[k, span.at + span.count : span.at + scales.numel() * BLOCK].fill_(
                                (127, 0)[k]
                            )  # code of 0
                            scales.copy_(saved[p][f"{name}_absmax"][span.first // BLOCK :][: scales.numel()])

    def _misfits(self, number: int, p: Parameter, entry: dict[str, Any]) -> list[str]:
        eight = self._kind == "8bit"
        scales = (-(-p.numel() // BLOCK),)
        wanted = {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        wanted |= {"exp_avg_absmax": scales, "exp_avg_sq_absmax": scales} if eight else {}
        found = {name: tuple(value.shape) for name, value in entry.items() if name != "step"}
        if "step" not in entry or found != wanted or (entry["exp_avg"].dtype == torch.uint8) != eight:
            rule = f"state of parameter {number} is {found or 'empty'}, not {self._kind} state of shapes {wanted}"
            return [
                problem(
                    "state_dict",
                    f"(parameter {number})",
                    rule,
                    "Load what an optimizer of the same parameters and state saved",
                )
            ]
        return []


def _blocks(span: Span) -> slice:
    return slice(span.at // BLOCK, span.at // BLOCK + -(-span.count // BLOCK))


def _dense(p: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous(t: Tensor) -> Tensor:
    """The elements in the order of memory."""
    return t if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def _like(value: Tensor, p: Parameter) -> Tensor:
    """A gradient or moment with its elements in the order of its parameter's."""
    same = (value.is_contiguous() and p.is_contiguous()) or value.stride() == p.stride()
    return value if same else torch.empty_like(p, dtype=value.dtype).copy_(value)


@dataclass
class Moments:
    """Row 0 of each belongs to m, row 1 to v. `values` are the moments, or their codes; `scales` the maxima of the
    blocks.
    """

    values: Tensor
    scales: Tensor | None = None


class _Update:
    """The update of a run, in memory that is allocated beforehand. 8-bit moments are decoded to float32, and encoded
    again.
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
