"""One optimizer step: gradients of all micro-batches, one division, clipping, the update; again if memory ran out.

    gradient = sum over micro-batches of d(loss sum) / (target tokens of the whole step)
    update with gradient * min(1, clip / norm)

The loss is summed and divided once, so 4 micro-batches of 1 and 1 of 4 are the same step (the alternative, a mean of
means, weighs a token by the size of its micro-batch). The division is applied to the float32 gradients rather than to
the loss: the numbers that flow back through a 16-bit model are then larger by the number of tokens, which is the loss
scaling that float16 needs. Division and clipping are one factor, which PagedAdamW applies as it reads the gradients.

A step whose loss or gradient is no finite number is not taken (`NotFinite`); the loop decides what then.

A step asks the device for a number once, when loss and norm decide whether it counts: between micro-batches a GPU never
waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qlora.data.batch import Batch
from qlora.errors import UserError, problem
from qlora.layers.dropout import draws_of, recomputation
from qlora.optim.memory_errors import ALLOCATION_ERRORS, out_of_memory
from qlora.train.metrics import Metrics
from qlora.train.rng import random_states, set_random_states
from qlora_kernels import ops


class NotFinite(UserError):
    """`name` (loss, grad_norm, ...) is no finite number at `step` (from 1), and nothing was updated.

    `rule` is its line without the remedy, for a caller that knows a better one; `skippable`: the step can be left out.
    """

    def __init__(self, name: str, value: float, step: int, skippable: bool = True):
        self.name, self.value, self.step, self.skippable = name, value, step, skippable
        self.rule = f"is no finite number at step {step}"
        super().__init__(problem(name, value, self.rule, SMALLER))


SMALLER = "Begin again with a smaller `learning_rate`, or with `dtype=bf16` or `dtype=fp32` if this is fp16"


@runtime_checkable
class SupportsPaging(Protocol):
    """An optimizer that pages its state, such as PagedAdamW: what a step may ask of it beyond torch's interface."""

    memory: int | str  # the budget of its state; with "all" it gives nothing back

    def summing(self) -> AbstractContextManager[Callable[[], None]]:
        """To be entered while gradients are made; what it gives is called after each backward pass."""

    def prepare(self) -> Any:
        """The part of `step` that needs no value of a gradient, to be taken while a GPU still computes."""

    def step(self, closure: Callable[[], Any] | None = None, prepared: Any = None, scale: float = 1.0) -> Any:
        """`prepared`: from `prepare`; `scale`: a factor of the gradients, applied as they are read."""

    def make_room(self) -> bool:
        """Give memory back after a failed allocation; False if there is none to give."""


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    Linear from 0 to `peak` over `warmup` steps, then by cosine or linearly to 0, or constant: the same values as
    transformers' `get_cosine_schedule_with_warmup` and its siblings.

    Raises:
        UserError: `schedule` is none of them.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * max(0.0, 1.0 - progress)
    if schedule == "constant":
        return peak
    raise UserError(problem("schedule", schedule, "must be cosine, linear or constant", "cosine is the default"))


def accumulate(model: nn.Module, batches: Sequence[Batch], after: Callable[[], None] = lambda: None) -> Tensor:
    """Add the gradient of the token loss summed over all `batches` to `.grad`; return that sum, a scalar on the device.

    Every target token weighs the same, however many its batch has: without dropout the result does not depend on how
    the examples were cut into batches (up to rounding). `after` is called when each batch has its gradient.
    """
    from qlora.layers.loss import loss_sum  # here: it loads transformers, of which a training loop knows nothing

    total = torch.zeros(())
    for number, batch in enumerate(batches):
        loss = loss_sum(model, batch)
        loss.backward()
        after()
        total = loss.detach() if number == 0 else total + loss.detach()
    return total


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    rate: float,
    clip: float,
    step: int = 0,
) -> Metrics:
    """One step over `batches`; returns loss and grad_norm (before clipping).

    Where an allocation fails, an optimizer that can (`SupportsPaging`) gives memory back, and the whole step is taken
    again from the same random states: the result is that of an undisturbed step.

    Args:
        rate: the learning rate.
        clip: the largest norm of the gradients; 0 for any.
        step: its number (from 0), for messages.

    Raises:
        NotFinite: the loss or the norm of the gradient; nothing has been updated then.
        UserError: memory ran out; the same.
    """
    while True:
        before = random_states(model)
        try:
            return _optimizer_step(model, optimizer, batches, rate, clip, step)
        except ALLOCATION_ERRORS as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        # The exception is gone here, and with it the tensors of the failed step.
        optimizer.zero_grad(set_to_none=True)
        if not (isinstance(optimizer, SupportsPaging) and optimizer.make_room()):
            raise UserError(_out_of_memory(optimizer, step, reason))
        set_random_states(before, model)


def _out_of_memory(optimizer: torch.optim.Optimizer, step: int, reason: str) -> str:
    remedy = "Use a smaller `batch_size` (with more `accumulate`) or `max_tokens`, or `gradient_checkpointing`"
    if isinstance(optimizer, SupportsPaging) and optimizer.memory == "all":
        remedy += ", or `optimizer_memory=auto`"
    return problem("memory", "(all used)", f"an allocation failed at step {step + 1}: {reason}", remedy)


def _optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], rate: float, clip: float, step: int
) -> Metrics:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    draws = draws_of(model)
    lent = draws.lend() if draws is not None else nullcontext()
    summing = optimizer.summing() if isinstance(optimizer, SupportsPaging) else nullcontext(lambda: None)
    with lent, summing as after:
        total = accumulate(model, batches, after)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = ops.total_norm(gradients)
    for group in optimizer.param_groups:
        group["lr"] = rate
    prepared = optimizer.prepare() if isinstance(optimizer, SupportsPaging) else None  # while a GPU still computes
    targets = sum(batch.target_tokens for batch in batches)
    loss, grad_norm = (torch.stack([total.to(norm.device), norm]) / targets).tolist()
    _refuse_infinite(loss, grad_norm, step)
    # as torch.nn.utils.clip_grad_norm_ clips
    scale = (min(1.0, clip / (grad_norm + 1e-6)) if clip > 0 else 1.0) / targets
    if isinstance(optimizer, SupportsPaging):
        optimizer.step(prepared=prepared, scale=scale)
    else:
        torch._foreach_mul_(gradients, scale)
        optimizer.step()
    return {"loss": loss, "grad_norm": grad_norm}


def _refuse_infinite(loss: float, grad_norm: float, step: int) -> None:
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            raise NotFinite(name, value, step + 1)


def refuse_infinite_parameters(model: nn.Module, step: int) -> None:
    """Check what `step` steps have made of the trainable parameters: the update of a finite gradient can overflow.

    Raises:
        NotFinite: the first that holds a number that is not finite.
    """
    learning = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, p in learning.items():
        if not bool(torch.isfinite(p).all()):
            raise NotFinite(name, p[~torch.isfinite(p)][0].item(), step, skippable=False)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in the backward pass instead of keeping what is in it (arXiv:1604.06174).

    Non-reentrant: the inputs of the layers need no gradient of their own. Dropout draws the same mask again, from
    torch's generators, which torch puts back, and from the adapters' own (`dropout.recomputation`).
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # transformers is renaming it;
    if enable is None:
        enable = model.gradient_checkpointing_enable  # the old name warns
    enable({"use_reentrant": False, "context_fn": functools.partial(recomputation, draws_of(model))})
