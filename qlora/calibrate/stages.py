"""Text through a model one decoder layer at a time, each beginning where the last one stopped.

    hidden[b] = the input of layer `at` for batch b          run(i): layers at..i run, those before give hidden[b]

The model's own forward is called each time, so masks, positions and what else it makes for a layer are right whatever
the architecture; the layers that are passed over return at once. A layer may be changed between two runs: the later
ones are then fed by the changed one. So a text goes through each layer about twice, however many layers there are. The
alternative, to call the layers directly (as GPTQ's own code does), must know the arguments of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROBED = 8  # tokens that a model is tried with


class Enough(Exception):
    """What was wanted of a forward pass has been seen."""


def forward(model: nn.Module, ids: Tensor) -> None:
    """The model without its head on token ids [b, t], until something raises Enough."""
    inner = getattr(model, "base_model", model)
    ids = ids.to(next(model.parameters()).device)
    try:
        inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Enough:
        pass


@contextmanager
def _forwards(layers: Iterable[nn.Module], made: Callable[[int, Any], Any]) -> Iterator[None]:
    """`made(i, forward)` in the place of each layer's forward."""
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            own = layer.forward
            stack.callback(_restored, layer, vars(layer).get("forward"))
            layer.forward = made(i, own)
        yield


def _restored(layer: nn.Module, own: Any) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own


def _hidden(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states that a decoder layer was called with."""
    found: Tensor = arguments[0] if arguments else named["hidden_states"]
    return found


class Stages:
    """A text on its way through the decoder layers of a model.

    Attributes:
        at: the layer whose inputs `hidden` holds, by batch; 0: the text has not begun.
    """

    def __init__(self, model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]):
        self.model, self.layers, self.batches = model, layers, batches
        self.at = 0
        self.hidden: list[Tensor] = []
        self.in_tuple = [False] * len(layers)

    def run(self, i: int, before: Callable[[], None]) -> None:
        """Every batch as far as layer i (at or after `at`), which then is where the text stands; `before` is
        called ahead of each.
        """
        reached: list[Tensor] = []
        for b, batch in enumerate(self.batches):
            before()

            def made(j: int, own: Any, b: int = b) -> Any:
                def run(*arguments: Any, **named: Any) -> Any:
                    if j < self.at:
                        return (self.hidden[b],) if self.in_tuple[j] else self.hidden[b]
                    if j == i:
                        reached.append(_hidden(arguments, named))
                    found = own(*arguments, **named)
                    if j == i:
                        raise Enough
                    return found

                return run

            with _forwards(self.layers, made):
                forward(self.model, batch)
        self.at, self.hidden = i, reached

    def works(self) -> bool:
        """Whether the model can be run so: each layer once, in their order, on nothing but the hidden states and what
        the model makes anew. A few tokens are run both ways.
        """
        if len(self.layers) < 2 or not self.batches:
            return False
        order: list[int] = []
        seen: dict[int, Tensor] = {}
        last = len(self.layers) - 1

        def noted(i: int, own: Any) -> Any:
            def run(*arguments: Any, **named: Any) -> Any:
                order.append(i)
                seen[i] = _hidden(arguments, named)
                found = own(*arguments, **named)
                self.in_tuple[i] = isinstance(found, tuple)
                seen[i + 1] = found[0] if self.in_tuple[i] else found
                return found

            return run

        tried = Stages(self.model, self.layers, [self.batches[0][:1, :PROBED]])
        try:
            with _forwards(self.layers, noted):
                forward(self.model, tried.batches[0])
            tried.in_tuple = self.in_tuple
            tried.at, tried.hidden = last, [seen[last]]
            first = seen[last + 1]
            with _forwards(self.layers[last:], lambda _, own: noted(last, own)):
                tried.run(last, lambda: None)
        except Exception:  # whatever a stranger's forward does without its layers: the text goes whole
            return False
        return order == [*range(last + 1), last] and torch.equal(first, seen[last + 1])


def decoder_layers(model: nn.Module, names: Iterable[str]) -> tuple[str, nn.ModuleList] | None:
    """The list of modules that holds most of the layers `names`, and its name; None where no list holds any."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    held = {name: sum(layer.startswith(f"{name}.") for layer in names) for name in lists}
    outer = [name for name in held if held[name] and held[name] == max(held.values())]
    return (outer[0], lists[outer[0]]) if outer else None
