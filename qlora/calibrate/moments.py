"""What the linear layers of a model are fed: H = mean of x xt over calibration text, [in, in] for each input.

    rows of text -> model, its own forward -> a hook on each layer -> H, shared by layers of the same input (q, k, v)

The model runs as it is, whatever its architecture; all H together can be larger than the model, so they are taken for
as many layers at a time as `budget` bytes hold, with the text run once for each such group, no further than its last
layer. Text is cut to rectangles without padding, so no moment is of padding; the first position is left out, since it
draws attention to itself with values that are a hundred times larger and the same in every text. The alternative, layer
by layer on stored hidden states (GPTQ), runs the text once but must know how each architecture calls its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batch import Example, by_length
from qlora.data.order import epoch_order

BUDGET = 1 << 29  # bytes of moments at a time; one H is taken however large it is


def rectangles(examples: Sequence[Example], tokens: int, seed: int, batch_size: int) -> list[Tensor]:
    """About `tokens` tokens of `examples`, those that a run with this seed sees first, as batches [b, t]
    without padding.

    Examples of like length share a batch and are cut to its shortest.
    """
    chosen: list[Example] = []
    left = tokens
    for i in epoch_order(len(examples), seed, 0):
        example = Example(examples[i].input_ids[:left], examples[i].loss_mask[:left])
        if len(example.input_ids) > 1:
            chosen.append(example)
            left -= len(example.input_ids)
    batches = []
    for group in by_length(chosen, batch_size):
        shortest = min(len(example.input_ids) for example in group)
        batches.append(torch.tensor([example.input_ids[:shortest] for example in group]))
    return batches


@dataclass
class Moments:
    """The sum of x xt over the inputs of one or more layers, and how many there were."""

    layers: list[str]
    sums: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        return self.sums / max(1, self.count)


class _Enough(Exception):
    """The last layer of a group has been fed."""


@dataclass
class _Hooks:
    """Adds up what the layers of a group are fed. `last`: the layer that is fed last, once a batch has shown it."""

    names: dict[nn.Module, str]
    batch: tuple[int, int] = (0, 0)
    found: dict[str, Moments] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    seen: list[tuple[Tensor, Moments]] = field(default_factory=list)  # of this forward, so that equal inputs are known
    last: str | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        name, x = self.names[module], inputs[0]
        self.order.append(name)
        first = name not in self.found
        if first:
            same = next((moments for tensor, moments in self.seen if tensor is x), None)
            if same is not None:
                same.layers.append(name)
            width = x.shape[-1]
            new = Moments([name], torch.zeros(width, width, device=x.device))
            self.found[name] = new if same is None else same
        moments = self.found[name]
        if moments.layers[0] == name:
            self.seen.append((x, moments))
            del self.seen[:-2]
            rows = self._rows(x)
            moments.sums.addmm_(rows.t(), rows)
            moments.count += len(rows)
        if name == self.last:
            raise _Enough

    def _rows(self, x: Tensor) -> Tensor:
        """The inputs [n, in] in float32, without those of the first position where they can be told."""
        if x.dim() == 3 and x.shape[:2] == self.batch:
            x = x[:, 1:]
        elif x.dim() == 2 and len(x) == self.batch[0] * self.batch[1]:
            x = x.view(*self.batch, -1)[:, 1:]
        return x.reshape(-1, x.shape[-1]).float()


@contextmanager
def _hooked(hooks: _Hooks) -> Iterator[None]:
    with ExitStack() as stack:
        for module in hooks.names:
            stack.callback(module.register_forward_pre_hook(hooks).remove)
        yield


@torch.no_grad()
def input_moments(
    model: nn.Module, widths: dict[str, int], batches: Sequence[Tensor], budget: int = BUDGET
) -> Iterator[Moments]:
    """The moments of every layer that `widths` names, with its number of inputs, in the order of `widths`.

    A layer may be changed once its moments came: the layers of later groups are then fed by the changed model. A layer
    that the text never reaches gets none.

    Args:
        model: in evaluation mode.
        widths: inputs by layer.
        batches: token ids [b, t].
        budget: bytes of moments to hold at once, counted as if no two layers shared theirs.
    """
    inner = getattr(model, "base_model", model)  # without the head
    device = next(model.parameters()).device
    for group in _groups(widths, budget):
        hooks = _Hooks({model.get_submodule(name): name for name in group})
        with _hooked(hooks):
            for batch in batches:
                hooks.batch, hooks.order, hooks.seen = (batch.shape[0], batch.shape[1]), [], []
                ids = batch.to(device)
                try:
                    inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
                except _Enough:
                    continue
                hooks.last = hooks.order[-1] if hooks.order else None
        hooks.seen = []
        for name, moments in hooks.found.items():
            if moments.layers[0] == name and moments.count:
                yield moments


def _groups(widths: dict[str, int], budget: int) -> Iterator[list[str]]:
    """Consecutive layers whose moments fit the budget together, at least one each."""
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        size = 4 * width * width
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
