"""TODO head of train.step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora.errors import UserError, problem
from qlora.layers.loss import loss_sum
from qlora.optim.memory_errors import ALLOCATION_ERRORS, out_of_memory
from qlora.train.metrics import Metrics
from qlora.train.rng import random_states, set_random_states
from qlora_kernels import ops


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear from 0 over `warmup` steps, then by cosine or
    linearly to 0, or constant.

    The same values as transformers' `get_cosine_schedule_with_warmup` and its siblings.
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


def accumulate(model: nn.Module, batches: Sequence) -> Tensor:
    """Add the gradient of the token loss summed over all `batches` to `.grad`; return that sum, a scalar on the device.

    Every target token weighs the same, however many its batch has: without dropout the result does not depend on how
    the examples were cut into batches (up to rounding).
    """
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch)
        loss.backward()
        total = total + loss.detach()
    return total


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence, rate: float, clip: float, step: int = 0
) -> Metrics:
    """One step over `batches` at learning rate `rate`, gradients clipped to norm `clip` (0: not); returns loss and
    grad_norm (before clipping).

    Where an allocation fails, an optimizer that can (`make_room`) gives memory back, and the whole step is taken again
    from
    the same random states: the result is that of an undisturbed step.

    Raises:
        UserError: the loss or the norm of the gradient is not finite, or memory ran out; nothing has been updated then.
    """
    while True:
        before = random_states()
        try:
            return _optimizer_step(model, optimizer, batches, rate, clip, step)
        except ALLOCATION_ERRORS as error:
            if not out_of_memory(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
        # The exception is gone here, and with it the tensors of the failed step.
        optimizer.zero_grad(set_to_none=True)
        if not getattr(optimizer, "make_room", lambda: False)():
            remedy = "Give a smaller --batch-size (with more --accumulate) or --max-tokens, or --gradient-checkpointing"
            if getattr(optimizer, "memory", None) == "all":
                remedy += ", or --optimizer-memory auto"
            raise UserError(problem("memory", "(all used)", f"an allocation failed at step {step + 1}: {said}", remedy))
        set_random_states(before)


def _optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence, rate: float, clip: float, step: int
) -> Metrics:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    total = accumulate(model, batches)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = ops.total_norm(gradients)
    for group in optimizer.param_groups:
        group["lr"] = rate
    prepared = optimizer.prepare() if hasattr(optimizer, "prepare") else None  # while a GPU still computes
    targets = sum(batch.target_tokens for batch in batches)
    loss, norm = (torch.stack([total.to(norm.device), norm]) / targets).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        name, value = ("loss", loss) if not math.isfinite(loss) else ("grad_norm", norm)
        remedy = "Begin again with a smaller --learning-rate, or with --dtype bf16 or fp32 if this is fp16"
        raise UserError(problem(name, value, f"is no finite number at step {step + 1}", remedy))
    scale = (min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0) / targets  # as torch.nn.utils.clip_grad_norm_ clips
    if prepared is not None:
        optimizer.step(prepared=prepared, scale=scale)
    else:
        torch._foreach_mul_(gradients, scale)
        optimizer.step()
    return {"loss": loss, "grad_norm": norm}


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in the backward pass instead of keeping what is in it (arXiv:1604.06174). Non-reentrant: the
    inputs of the layers need no gradient of their own, and dropout draws the same mask again."""
    # transformers is renaming it; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
