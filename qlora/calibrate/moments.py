"""What the linear layers of a model are fed: H = mean of x xt over calibration text, [in, in] for each input.

    rows of text -> model, its own forward -> a hook on each layer -> H, shared by layers of the same input (q, k, v)

The text goes from one decoder layer to the next (`stages`), so a layer may be changed before the later ones are fed; of
one layer's H, as many are held at a time as `budget` bytes hold. Where a model does not allow that, the text is run
whole for each such group of layers, no further than its last one. Text is cut to rectangles without padding, so no
moment is of padding. The first position draws attention to itself with values that are a hundred times larger and the
same in every text. It counts: left out, the KL of an adapter's start was 0.083 instead of 0.069 (docs/log.md), since
errors lie unseen where H is small. Of a very wide input only blocks on the diagonal of H are taken where the caller
says so: H of 28,672 inputs is 3.3 GB. The alternative, all H at once, can be larger than the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora.calibrate.stages import Enough, Stages, decoder_layers, forward
from qlora.data.batch import Example, by_length
from qlora.data.order import epoch_order

BUDGET = 1 << 29  # bytes of moments at a time; one H is taken however large it is
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
    """The sum of x xt over the inputs of one or more layers, and how many there were.

    Attributes:
        sums: [blocks, width, width], the blocks on the diagonal of H; one where H was not cut. What lies right of a
            strip's own columns is not summed: H is symmetric, so that is little more than half of the products.
    """

    layers: list[str]
    sums: Tensor
    count: int = 0

    @property
    def blocks(self) -> Tensor:
        """The mean of x xt, [blocks, width, width]."""
        for begin, end in self._strips():  # what was not summed
            self.sums[:, :begin, begin:end] = self.sums[:, begin:end, :begin].mT
        return self.sums / max(1, self.count)

    @property
    def mean(self) -> Tensor:
        """H [in, in], of moments that were not cut."""
        (found,) = self.blocks
        return found

    def add(self, rows: Tensor) -> None:
        """Take inputs [n, in] in float32, or in bf16: products by the machine's bf16 unit, sums in float32."""
        width = self.sums.shape[1]
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


@dataclass
class _Hooks:
    """Adds up what the layers of a group are fed. `last`: the layer that is fed last, once a batch has shown it."""

    names: dict[nn.Module, str]
    widest: int | None = None
    rounded: bool = False
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
            width = block_width(x.shape[-1], self.widest)
            new = Moments([name], torch.zeros(x.shape[-1] // width, width, width, device=x.device))
            self.found[name] = new if same is None else same
        moments = self.found[name]
        if moments.layers[0] == name:
            self.seen.append((x, moments))
            del self.seen[:-2]
            rows = x.reshape(-1, x.shape[-1])
            moments.add(rows if self.rounded and rows.dtype == torch.bfloat16 else rows.float())
        if name == self.last:
            raise Enough

    def begin(self) -> None:
        """A batch comes next."""
        self.order, self.seen = [], []

    def moments(self) -> Iterator[Moments]:
        """What was found, each H once."""
        self.seen = []
        for name, moments in self.found.items():
            if moments.layers[0] == name and moments.count:
                yield moments


@contextmanager
def _hooked(hooks: _Hooks) -> Iterator[None]:
    with ExitStack() as stack:
        for module in hooks.names:
            stack.callback(module.register_forward_pre_hook(hooks).remove)
        yield


@torch.no_grad()
def input_moments(
    model: nn.Module,
    widths: dict[str, int],
    batches: Sequence[Tensor],
    budget: int = BUDGET,
    widest: int | None = None,
    rounded: bool = False,
) -> Iterator[Moments]:
    """The moments of every layer that `widths` names, with its number of inputs: decoder layer by decoder layer where
    the model can be run so, else in the order of `widths`.

    A layer may be changed once its moments came: later layers, or layers of later groups, are then fed by the changed
    model. A layer that the text never reaches gets none.

    Args:
        model: in evaluation mode.
        widths: inputs by layer.
        batches: token ids [b, t].
        budget: bytes of moments to hold at once at most, see `held_bytes`.
        widest: inputs that H is taken of whole; of more, blocks on its diagonal. None: always whole.
        rounded: products of bf16 inputs may be rounded to bf16, which is some times faster; H then has no inverse.
    """
    budget = held_bytes(model, widths, budget, widest)
    found = decoder_layers(model, widths)
    stages = None if found is None else Stages(model, found[1], batches)
    if found is None or stages is None or not stages.works():
        yield from _by_whole_text(model, _groups(widths, budget, widest), batches, widest, rounded)
        return
    inside = [name for name in widths if name.startswith(f"{found[0]}.")]
    outside = {name: width for name, width in widths.items() if name not in inside}
    yield from _by_whole_text(model, _groups(outside, budget, widest), batches, widest, rounded)
    for i in range(len(found[1])):
        layer = {name: widths[name] for name in inside if name.startswith(f"{found[0]}.{i}.")}
        for group in _groups(layer, budget, widest):
            hooks = _Hooks({model.get_submodule(name): name for name in group}, widest, rounded)
            with _hooked(hooks):
                stages.run(i, hooks.begin)
            yield from hooks.moments()


def _by_whole_text(
    model: nn.Module, groups: Iterator[list[str]], batches: Sequence[Tensor], widest: int | None, rounded: bool
) -> Iterator[Moments]:
    """The text from its beginning for each group of layers, as far as the last of them."""
    for group in groups:
        hooks = _Hooks({model.get_submodule(name): name for name in group}, widest, rounded)
        with _hooked(hooks):
            for batch in batches:
                hooks.begin()
                forward(model, batch)
                hooks.last = hooks.order[-1] if hooks.order else None
        yield from hooks.moments()


def held_bytes(model: nn.Module, widths: dict[str, int], budget: int = BUDGET, widest: int | None = None) -> int:
    """How many bytes of moments are held at a time: those of the decoder layer with most, as if no two layers shared
    theirs, but no more than `budget` and no less than one H. The same whether the model can be run layer by layer.
    """
    found = decoder_layers(model, widths)
    lists = "" if found is None else f"{found[0]}."
    by_layer: Counter[str] = Counter()
    for name, width in widths.items():
        inside = bool(lists) and name.startswith(lists)
        by_layer[name.removeprefix(lists).split(".")[0] if inside else ""] += _bytes(width, widest)
    largest = max((_bytes(width, widest) for width in widths.values()), default=0)
    return max(largest, min(budget, max(by_layer.values(), default=0)))


def _bytes(width: int, widest: int | None) -> int:
    """Of the moments of so many inputs."""
    return 4 * width * block_width(width, widest)


def _groups(widths: dict[str, int], budget: int, widest: int | None) -> Iterator[list[str]]:
    """Consecutive layers whose moments fit the budget together, at least one each."""
    group: list[str] = []
    held = 0
    for name, width in widths.items():
        size = _bytes(width, widest)
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
