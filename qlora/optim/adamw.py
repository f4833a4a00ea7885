"""AdamW whose state lies in pages: what does not fit a budget spills, small tensors included.

    summing   the gradients of a step's micro-batches, on a card page by page  (flat.py)
    prepare   which parameters have a gradient, and their runs            (update.py, no value of a gradient is needed)
    step      for each page: the update of its runs                       (update.py), moments in pages (moments.py)
    state_dict, load_state_dict                                           (state_dict.py), torch's form

A step allocates all that it needs before it changes anything: an allocation that fails leaves parameters and state as
they were. The alternative, a state of tensors that are each paged on demand, pages no small tensor and loses its paging
in load_state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import Parameter

from qlora.errors import UserError, problem
from qlora.optim import pages
from qlora.optim import state_dict as saved_state
from qlora.optim.flat import GradientSums, lay_out
from qlora.optim.moments import PagedMoments
from qlora.optim.pager import Pager
from qlora.optim.update import Due, Run, Scalars, Update, runs_of, scalars_of
from qlora.sizes import parse_memory
from qlora_kernels import reference


class Prepared(NamedTuple):
    """What `PagedAdamW.prepare` found: the parameters of the next step, and the runs of each page that has any."""

    due: Due
    work: list[tuple[int, list[Run]]]


class PagedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with a budget for its state.

    `state_dict` has torch's form; its tensors are the state itself, not a copy, and what is spilled stays so. `pager`
    counts resident, spilled and moved bytes. `close` gives everything back; so does dropping the last reference.

    Args:
        memory: what of the state may lie on the parameters' device: bytes, a text such as "200MB", "none", "all" (never
            spill), or "auto": all of it until an allocation fails, see `make_room`. The rest lies in a file in `folder`
            (CPU) or in pinned host memory (CUDA).
        state: "float32" keeps two moments in each parameter's dtype, float32 for float32; the updates are those of
            torch.optim.AdamW(foreach=False), to the bit on a CPU, whatever the budget. "8bit" keeps them in blocks of
            256 that share a scale.
        folder: by default the system's folder for temporary files.

    Raises:
        UserError: everything that is wrong with the arguments; no room for what is to be spilled.
    """

    _moments: PagedMoments  # made when the first groups are known

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
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.memory = _checked_memory(defaults, memory, state)
        self._steps: dict[Parameter, int] = {}
        self._complete = False
        super().__init__(params, defaults)
        learning = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
        self._moments = PagedMoments(learning, state, self.memory, folder)
        self._lay_out(0)
        self._complete = True

    @property
    def pager(self) -> Pager:
        """The pages of the state, which count resident, spilled and moved bytes."""
        return self._moments.pager

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._complete:  # the first groups come together
            self._place(p for p in self.param_groups[-1]["params"] if p.requires_grad)

    def _place(self, parameters: Iterable[Parameter]) -> None:
        known = len(self._moments.pages)
        self._moments.add(parameters)
        self._lay_out(known)

    def _lay_out(self, first: int) -> None:
        """On a card, the parameters of pages `first` and after in one piece each."""
        if self.pager.device.type in pages.FLAT:
            for page in self._moments.pages[first:]:
                lay_out(page)

    # ---------------------------------------------------------------- a step

    @contextmanager
    def summing(self) -> Iterator[Callable[[], None]]:
        """While entered, gradients are summed as `flat` says, on a card; what it yields is to be called after the
        backward pass of each micro-batch. Afterwards every `grad` is the sum, as ever. On a CPU nothing is different.
        """
        sums = GradientSums(self._moments.pages)
        with sums.collecting():
            yield sums.end_micro_batch
        sums.finish()

    @torch.no_grad()
    def prepare(self) -> Prepared:
        """What `step` does first, which needs no value of a gradient.

        For a 7B model it takes milliseconds: time that a GPU spends on the gradients if `step` gets it from here, and
        waiting if not. Good for the next step, with the gradients and rates that there are.
        """
        self._refuse_closed()
        due, moments = self._due(), self._moments
        self._place(due)
        device, block = moments.pager.device, moments.block
        found = ((number, runs_of(page, due, device, block)) for number, page in enumerate(moments.pages))
        return Prepared(due, [(number, runs) for number, runs in found if runs])

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, prepared: Prepared | None = None, scale: float = 1.0
    ) -> Any:
        """Update every parameter that has a gradient; returns the loss of `closure`, if given.

        Args:
            prepared: from `prepare`.
            scale: what gradients are multiplied by as they are read; they stay as they are. Multiplying before would
                pass over them once more.

        Raises:
            MemoryError, torch.OutOfMemoryError, RuntimeError, OSError: an allocation failed
                (`memory_errors.out_of_memory` tells). Nothing has changed then, and the step can be taken again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, work = self.prepare() if prepared is None or closure is not None else prepared
        moments = self._moments
        with moments.pager.sequence([number for number, _ in work]) as memories:
            runs = [run for _, runs in work for run in runs]
            update = Update(runs, moments.pager.device, moments.state == "8bit", scale)
            # From here on nothing is allocated: what begins ends.
            for (number, runs), memory in zip(work, memories, strict=True):
                page = moments.view(memory, number)
                for run in runs:
                    update(run, page)
        reference.mark_mutated([p for number, _ in work for p in moments.pages[number].in_piece()])
        self._steps |= {p: scalars.step for p, (scalars, _) in due.items()}
        return loss

    def _due(self) -> Due:
        due: Due = {}
        device = self.pager.device
        for group in self.param_groups:
            known: dict[int, Scalars] = {}
            for p in group["params"]:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    remedy = "Make its layer with sparse=False"
                    raise UserError(problem("params", tuple(p.shape), "has a sparse gradient", remedy))
                if p.device != device:
                    rule = f"the optimizer was made for parameters on {device}"
                    raise UserError(problem("device", p.device, rule, "Make the optimizer after moving the model"))
                step = self._steps.get(p, 0) + 1
                if step not in known:
                    known[step] = scalars_of(group, step)
                due[p] = known[step], gradient
        return due

    # ---------------------------------------------------------------- memory

    def make_room(self) -> bool:
        """After a failed allocation: move half of the resident pages (at least one) to the slow tier, for good.

        What is computed does not change. Returns False if nothing is left to give up, or with memory="all".
        """
        self._refuse_closed()
        return self.pager.evict(-(-self.pager.resident // 2)) > 0 if self.memory != "all" else False

    def close(self) -> None:
        """Give all memory and files back. The optimizer cannot be used any more."""
        self.pager.close()

    def _refuse_closed(self) -> None:
        if self.pager.closed:
            rule = "was closed and has no state any more"
            raise UserError(problem("optimizer", "PagedAdamW", rule, "Make a new one"))

    def __reduce_ex__(self, protocol):  # copy.deepcopy comes here too
        rule = "owns memory and a file, of which there is no copy"
        raise UserError(problem("optimizer", "PagedAdamW", rule, "Take its state_dict(), and load that into a new one"))

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """torch's form, see state_dict.py. No copy of the state is made: a later step changes what is returned."""
        self._refuse_closed()
        for p, entry in saved_state.entries(self._moments, self._steps).items():
            self.state[p] = entry
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or, for float32 state, of torch.optim.AdamW.

        The values go into the pages, wherever those lie.

        Raises:
            UserError: everything about it that does not fit; nothing has been changed then.
        """
        self._refuse_closed()
        saved = saved_state.fitting_entries(state_dict, self.param_groups, self._moments)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._place(saved)
        self._steps = {p: int(entry["step"]) for p, entry in saved.items()}
        saved_state.fill(self._moments, saved)


def _checked_memory(options: dict[str, Any], memory: int | str, state: str) -> int | str:
    """`memory` as bytes, "none", "all" or "auto".

    Raises:
        UserError: everything that is wrong with the arguments.
    """
    betas = options["betas"]
    rules = (
        ("lr", options["lr"], float(options["lr"]) >= 0, "at least 0"),
        ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers from 0 to below 1"),
        ("eps", options["eps"], options["eps"] >= 0, "at least 0"),
        ("weight_decay", options["weight_decay"], options["weight_decay"] >= 0, "at least 0"),
        ("state", state, state in ("float32", "8bit"), "float32 or 8bit"),
    )
    problems = [
        problem(name, value, f"must be {rule}", "Correct it") for name, value, right, rule in rules if not right
    ]
    try:
        memory = parse_memory(memory)
    except ValueError as error:
        problems.append(problem("memory", memory, str(error), "Give for example 200MB"))
    if problems:
        raise UserError(problems)
    return memory
