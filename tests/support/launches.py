"""The launches of a card, counted without one: what a step on meta tensors calls, planned for a card.

Views and empty tensors launch nothing, an operator of torch one kernel, one of ours as many as `OURS` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data.batch import Example, pack
from qlora.layers.loss import loss_sum
from qlora_kernels import backends

# Of the Triton kernels, where it is not one: two products of cuBLAS, and what finishes dB (and dm); the factors and the
# weight. `triton_interpret.check_launches` counts them.
OURS = {"adapter_gradients": 3, "joined_gradients": 3, "adapted_operands": 2}
NOTHING = ("empty", "detach", "lift_fresh", "_local_scalar_dense", "is_same_size", "_unsafe_view")


class Launches(TorchDispatchMode):
    """`found`: launches by operator, `overloads`: calls by its name and the overload's. `moved`: bytes written by what
    makes or adds gradients of slices.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.overloads: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and not any(part in name for part in NOTHING):
            self.overloads[f"{name}.{function._overloadname}"] += 1
            self.found[name] += OURS.get(name, 1) if namespace == "qlora" else 1
        if name in ("slice_backward", "select_backward", "cat", "add"):
            self.moved += result.numel() * result.element_size()
        return result


def of_a_step(model: nn.Module, lengths: tuple[int, ...], after: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """(launches of the forward pass, of the backward pass) of one micro-batch of `model`, which is on the meta device,
    on a card. `after` belongs to the backward pass.
    """
    batch = pack([Example((1,) * n, (False,) + (True,) * (n - 1)) for n in lengths])
    with backends.planned_for("cuda"):
        with Launches() as forward:
            loss = loss_sum(model.train(), batch)
        with Launches() as backward:
            loss.backward()
            after()
    model.zero_grad()  # or the next step adds to these
    return forward.found.total(), backward.found.total()
