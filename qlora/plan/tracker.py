"""What a step of training takes in passing, found by running it on the meta device.

    forward -> backward -> evaluation, under `AllocationTracker`, which sees every storage come and go

The tracker follows the code, so a plan knows every architecture that trains. The alternative, a formula of bytes a
layer, is faster but has to be kept true by hand for each of them, and cannot know what a backward pass holds at its
worst moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data.batch import Batch
from qlora.evaluate import token_sums
from qlora.layers.loss import loss_sum
from qlora.layers.weight import forget_scratch


class AllocationTracker(TorchDispatchMode):
    """Bytes of the meta storages that operations have made since it was entered.

    `now` are those that still live, `peak` the most that lived at once. Storages of `known` are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype == torch.bool:  # transformers asks whether a mask of padding is all true: this one is not
                return False
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    self.now += self._live[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a micro-batch takes in passing, gradients not counted.

    `kept` lie from the forward to the backward pass, `passing` on top of them at the worst moment; `evaluating` is all
    that an evaluation takes.
    """

    kept: int
    passing: int
    evaluating: int


def waiting_on_meta(model: nn.Module, shape: tuple[int, int], layers: Iterable[nn.Module]) -> int:
    """The most bytes that a forward pass over token ids of this shape [b, t], without padding, holds just ahead of one
    of the `layers`, on the meta device. What stays of a first pass, such as a decoded weight's place, all passes share.
    """
    held: list[int] = []
    forget_scratch("meta")
    inner = getattr(model.eval(), "base_model", model)
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    tracker = AllocationTracker([*model.parameters(), *model.buffers()])
    with tracker, torch.no_grad():
        inner(input_ids=ids, use_cache=False)
        shared = tracker.now
        hooks = [layer.register_forward_pre_hook(lambda *_: held.append(tracker.now)) for layer in layers]
        inner(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    forget_scratch("meta")
    return max(held, default=shared) - shared


def run_on_meta(model: nn.Module, batch: Batch) -> StepBytes:
    """Forward and backward pass of one micro-batch, and an evaluation of it, on the meta device."""
    forget_scratch("meta")
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    with AllocationTracker([*model.parameters(), *model.buffers()]) as tracker:
        total = loss_sum(model.train(), batch)
        forward = tracker.now
        total.backward()
        del total
        kept, peak = forward - tracker.now, tracker.peak
        tracker.peak = tracker.now
        with torch.no_grad():
            for _ in token_sums(model.eval(), batch):
                pass
    for hook in hooks:
        hook.remove()
    forget_scratch("meta")
    return StepBytes(kept, peak - kept, tracker.peak)
