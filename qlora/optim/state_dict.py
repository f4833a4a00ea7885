"""The state of `PagedAdamW` in torch's form, out of its pages and into them.

    exp_avg, exp_avg_sq                     m and v, shaped and strided as their parameter; for 8-bit state their codes
    exp_avg_absmax, exp_avg_sq_absmax       [blocks] float32, only for 8-bit state
    step                                    a scalar tensor

Tensors that lie in one page are views of it; one over several pages is joined in memory that is mapped from a file if
pages are spilled to one, since it would undo the saving. The alternative, a copy of everything, doubles the memory of a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qlora.errors import UserError, problem
from qlora.optim.moments import Moments, PagedMoments, blocks_of, in_memory_order, ordered_as
from qlora.optim.pages import BLOCK, Span

NAMES = ("exp_avg", "exp_avg_sq")
CODES_OF_ZERO = (127, 0)  # in the signed map of m, in the unsigned one of v

Entry = dict[str, Tensor]


def entries(moments: PagedMoments, steps: Mapping[Parameter, int]) -> dict[Parameter, Entry]:
    """The state of each parameter that has taken a step. Not a copy: a later step changes what is returned."""
    memory = moments.pager.pages()
    found = {}
    for p, step in steps.items():
        entry = {"step": torch.tensor(float(step))}
        parts = [(moments.view(memory[number], number), span) for number, span in moments.spans[p]]
        for k, name in enumerate(NAMES):
            values = _joined(moments, [part.values[k, span.at : span.at + span.count] for part, span in parts])
            entry[name] = values.as_strided(p.shape, p.stride())
            if moments.state == "8bit":
                entry[f"{name}_absmax"] = _joined(moments, [part.scales[k, blocks_of(span)] for part, span in parts])
        found[p] = entry
    return found


def _joined(moments: PagedMoments, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    count = sum(part.numel() for part in parts)
    result = moments.pager.scratch(count * parts[0].element_size()).view(parts[0].dtype)
    for part, place in zip(parts, result.split([part.numel() for part in parts]), strict=True):
        place.copy_(part)
    return result


def fitting_entries(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], moments: PagedMoments
) -> dict[Parameter, Entry]:
    """The entries of a state_dict by the parameters of `groups`.

    Raises:
        UserError: everything about it that does not fit.
    """
    theirs = state_dict["param_groups"]
    found, wanted = ([len(group["params"]) for group in each] for each in (theirs, groups))
    if found != wanted:
        rule = f"has groups of {found} parameters, not {wanted}"
        raise UserError(problem("state_dict", "(groups)", rule, "Make the optimizer with the same groups"))
    rule, remedy = "is nothing that PagedAdamW does", "Use torch.optim.AdamW for it"
    problems = [
        problem("state_dict", option, rule, remedy)
        for option in ("amsgrad", "maximize")
        if any(group.get(option) for group in theirs)
    ]
    keys = [key for group in theirs for key in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    states = state_dict["state"]
    saved = {p: states[key] for key, p in zip(keys, parameters, strict=True) if states.get(key)}
    for number, (p, entry) in enumerate(saved.items()):
        problems += _misfits(number, p, entry, moments.state)
    if problems:
        raise UserError(problems)
    return saved


def _misfits(number: int, p: Parameter, entry: Entry, state: str) -> list[str]:
    eight = state == "8bit"
    scales = (-(-p.numel() // BLOCK),)
    wanted = {name: tuple(p.shape) for name in NAMES}
    wanted |= {f"{name}_absmax": scales for name in NAMES} if eight else {}
    found = {name: tuple(value.shape) for name, value in entry.items() if name != "step"}
    if "step" in entry and found == wanted and (entry["exp_avg"].dtype == torch.uint8) == eight:
        return []
    rule = f"state of parameter {number} is {found or 'empty'}, not {state} state of shapes {wanted}"
    remedy = "Load what an optimizer of the same parameters and state saved"
    return [problem("state_dict", f"(parameter {number})", rule, remedy)]


def fill(moments: PagedMoments, saved: Mapping[Parameter, Entry]) -> None:
    """Copy entries into the pages, wherever those lie; the state of parameters without an entry becomes zero."""
    flat = {
        p: {name: in_memory_order(ordered_as(entry[name], p)).view(-1) for name in NAMES} for p, entry in saved.items()
    }
    with moments.pager.sequence(range(len(moments.pages))) as pages:
        for number, memory in enumerate(pages):
            page = moments.view(memory, number)
            for p, span in moments.pages[number].spans:
                if p not in saved:
                    page.values[:, span.at : span.at + span.count].zero_()
                    page.scales[:, blocks_of(span)].zero_()
                    continue
                for k, name in enumerate(NAMES):
                    values = flat[p][name][span.first : span.first + span.count]
                    page.values[k, span.at : span.at + span.count].copy_(values)
                if moments.state == "8bit":
                    _fill_scales(page, span, saved[p])


def _fill_scales(page: Moments, span: Span, entry: Entry) -> None:
    """The scales of a span, and codes of zero for the rest of its last block."""
    for k, name in enumerate(NAMES):
        scales = page.scales[k, blocks_of(span)]
        page.values[k, span.at + span.count : span.at + scales.numel() * BLOCK].fill_(CODES_OF_ZERO[k])
        scales.copy_(entry[f"{name}_absmax"][span.first // BLOCK :][: scales.numel()])
