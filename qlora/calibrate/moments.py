"""What the linear layers of a model are fed: H = mean of x xt over calibration text, [in, in] for each layer.

    each batch its own forward pass -> all wait ahead of the same layer -> H of what they bring -> the layer may be
    changed -> all go on through it

So the text goes through the model once, and every layer is fed by those before it as they are by then. A pass waits
inside the model's own forward, whatever the architecture, as a greenlet: a function that stops and goes on later.
Waiting passes hold what a forward pass needs at that place, of all tokens. Text is cut to rectangles without padding,
so no moment is of padding. The first position draws attention to itself with values that are a hundred times larger and
the same in every text. It counts: left out, the KL of an adapter's start was 0.083 instead of 0.069 (docs/log.md),
since errors lie unseen where H is small. Of a very wide input only blocks on the diagonal of H are taken where the
caller says so: H of 28,672 inputs is 3.3 GB.

A model whose modules remember something of a forward pass (some that bring their own code) would mix up its passes. It
is tried first; such a model gets the text whole, again for each group of layers whose H fit `BUDGET`, and what is
changed feeds the later groups only. Alternatives not taken: to call the decoder layers one by one, as GPTQ's own code
does, must know the arguments of each architecture, and runs every layer twice; threads would each bring OpenMP threads
of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qlora.data.batch import Example, by_length
from qlora.data.order import epoch_order
from qlora_kernels import backends

BUDGET = 1 << 29  # bytes of moments at a time where a text goes whole; one H is taken however large it is
PROBED = 8  # tokens that a model is tried with
FILL = 1024  # tokens of a forward pass, where examples are shorter: fewer passes cost less
ROWS = 512  # inputs whose products are added up in the unit's own type
STRIP = 256  # rows of H that are summed together, at least


def forward_tokens(batch_size: int, max_tokens: int) -> int:
    """How many tokens of short examples share a forward pass of a run's start: no more than its steps may have."""
    return min(FILL, batch_size * max_tokens)


def rectangles(examples: Sequence[Example], tokens: int, seed: int, batch_size: int, fill: int = 0) -> list[Tensor]:
    """About `tokens` tokens of `examples`, those that a run with this seed sees first, as batches [b, t]
    without padding.

    Examples of like length share a batch and are cut to its shortest: `batch_size` of them, or as many as have `fill`
    tokens.
    """
    chosen: list[Example] = []
    left = tokens
    for i in epoch_order(len(examples), seed, 0):
        example = Example(examples[i].input_ids[:left], examples[i].loss_mask[:left])
        if len(example.input_ids) > 1:
            chosen.append(example)
            left -= len(example.input_ids)
    batches = []
    for group in by_length(chosen, batch_size, fill):
        shortest = min(len(example.input_ids) for example in group)
        batches.append(torch.tensor([example.input_ids[:shortest] for example in group]))
    return batches


@dataclass
class Moments:
    """The sum of x xt over the inputs of a layer, and how many there were.

    Attributes:
        sums: [blocks, width, width], the blocks on the diagonal of H; one where H was not cut. What lies right of a
            strip's own columns is not summed: H is symmetric, so that is little more than half of the products.
    """

    sums: Tensor
    count: int = 0

    def mean(self) -> Tensor:
        """H [blocks, width, width], in the place of the sums: nothing can be added any more."""
        for begin, end in self._strips():  # what was not summed
            self.sums[:, :begin, begin:end] = self.sums[:, begin:end, :begin].mT
        return self.sums.div_(max(1, self.count))

    def add(self, x: Tensor, rounded: bool) -> None:
        """Take inputs [..., in]. `rounded`: bf16 ones are multiplied by the machine's bf16 unit, where it has one; sums
        in float32.
        """
        rows, width = x.reshape(-1, x.shape[-1]), self.sums.shape[1]
        if not (rounded and rows.dtype == torch.bfloat16) or backends.is_widened(rows):
            rows = rows.float()
        for b, total in enumerate(self.sums):
            for part in rows[:, b * width : (b + 1) * width].split(ROWS):
                for begin, end in self._strips():
                    total[begin:end, :end] += part[:, begin:end].t() @ part[:, :end]
        self.count += len(rows)

    def _strips(self) -> Iterator[tuple[int, int]]:
        """The rows of a block of H, by first and end: at most 8 parts, as many launches on a card."""
        width = self.sums.shape[1]
        step = max(STRIP, -(-width // 8))
        return ((begin, min(begin + step, width)) for begin in range(0, width, step))


def block_width(inputs: int, widest: int | None, unit: int = 64) -> int:
    """The width of the blocks that H is cut into: `inputs` itself, or its largest part of at most `widest` that is a
    multiple of `unit`.
    """
    if widest is None or inputs <= widest:
        return inputs
    fitting = (inputs // parts for parts in range(2, inputs // unit + 1) if inputs % (parts * unit) == 0)
    return next((width for width in fitting if width <= widest), inputs)


def _empty(x: Tensor, widest: int | None) -> Moments:
    width = block_width(x.shape[-1], widest)
    return Moments(torch.zeros(x.shape[-1] // width, width, width, device=x.device))


@torch.no_grad()
def input_moments(
    model: nn.Module,
    widths: dict[str, int],
    batches: Sequence[Tensor],
    widest: int | None = None,
    rounded: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """The layers that `widths` names as the text comes to them, each with its H [blocks, width, width].

    A layer may be changed once its moments came: later layers are then fed by the changed one. A layer that the text
    never reaches gets none; of one that is called several times in a forward pass, the first call counts.

    Args:
        model: in evaluation mode.
        widths: inputs by layer.
        batches: token ids [b, t].
        widest: inputs that H is taken of whole; of more, blocks on its diagonal. None: always whole.
        rounded: products of bf16 inputs may be rounded to bf16, which is some times faster; H then has no inverse.
    """
    names = {model.get_submodule(name): name for name in widths}
    if not _undisturbed(model, names, batches):
        yield from _by_whole_text(model, widths, batches, widest, rounded)
        return
    inputs: list[Tensor] = []
    H = torch.empty(0)
    for name, waiting in in_step(model, names, batches):
        if len(inputs) != len(waiting) or any(a is not b for a, b in zip(inputs, waiting, strict=True)):
            inputs, H = waiting, torch.empty(0)
            moments = _empty(waiting[0], widest)
            for x in waiting:
                moments.add(x, rounded)
            H = moments.mean()  # else the same as of the layer before: q, k, v
        yield name, H


def in_step(
    model: nn.Module, names: dict[nn.Module, str], batches: Sequence[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each layer once, with what every forward pass that waits there is about to feed it; they go on when asked for the
    next. Where passes wait at different layers, as with experts, it is the first of these in the order of `names`.
    """
    order = {name: i for i, name in enumerate(names.values())}
    done: set[str] = set()

    def wait(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if names[module] not in done:
            getcurrent().parent.switch(names[module], inputs[0])

    passes = [greenlet(partial(_forward, model, batch)) for batch in batches]
    waiting: dict[greenlet, tuple[str, Tensor]] = {}
    going = passes
    try:
        with _hooked(names, wait):
            while len(done) < len(names):
                for one in going:
                    waiting.pop(one, None)
                    found = one.switch()
                    if not one.dead:
                        waiting[one] = found
                if not waiting:
                    return
                name = min((name for name, _ in waiting.values()), key=order.__getitem__)
                going = [one for one in passes if one in waiting and waiting[one][0] == name]
                done.add(name)
                yield name, [waiting[one][1] for one in going]
    finally:
        waiting.clear()
        for one in passes:
            if one:  # it waits: it ends there
                one.throw()


def _undisturbed(model: nn.Module, names: dict[nn.Module, str], batches: Sequence[Tensor]) -> bool:
    """Whether forward passes that wait for each other compute what each does alone: a few tokens tried both ways."""
    if len(batches) < 2:
        return True
    tried = [batches[0][:1, :PROBED], batches[-1][-1:, :PROBED].flip(1)]
    alone: dict[str, list[Tensor]] = {}
    try:
        for text in tried:
            for name, inputs in in_step(model, names, [text]):
                alone.setdefault(name, []).extend(x.clone() for x in inputs)
        for name, inputs in in_step(model, names, tried):
            if any((x - y).norm() > 0.01 * y.norm() for x, y in zip(inputs, alone[name], strict=True)):
                return False
    except Exception:  # whatever a stranger's modules raise when another pass comes between
        return False
    return True


def _by_whole_text(
    model: nn.Module, widths: dict[str, int], batches: Sequence[Tensor], widest: int | None, rounded: bool
) -> Iterator[tuple[str, Tensor]]:
    """The whole text for each group of layers."""
    for group in _groups(widths, widest):
        found: dict[str, Moments] = {}
        names = {model.get_submodule(name): name for name in group}

        def add(module: nn.Module, inputs: tuple[Any, ...], found: Any = found, names: Any = names) -> None:
            if names[module] not in found:
                found[names[module]] = _empty(inputs[0], widest)
            found[names[module]].add(inputs[0], rounded)

        with _hooked(names, add):
            for batch in batches:
                _forward(model, batch)
        yield from ((name, found.pop(name).mean()) for name in group if name in found)


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _forward(model: nn.Module, ids: Tensor) -> None:
    """The model without its head on token ids [b, t]."""
    inner = getattr(model, "base_model", model)
    ids = ids.to(next(model.parameters()).device)
    inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def moment_bytes(inputs: int, widest: int | None = None) -> int:
    """Of H of so many inputs; one is held at a time."""
    return 4 * inputs * block_width(inputs, widest)


def _groups(widths: dict[str, int], widest: int | None) -> Iterator[list[str]]:
    """Consecutive layers whose moments fit `BUDGET` together, at least one each."""
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        size = moment_bytes(width, widest)
        if group and held + size > BUDGET:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
