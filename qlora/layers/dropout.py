"""Dropout of the adapters' input, drawn from generators that belong to a model.

    y = x * mask / (1 - p),   mask ~ Bernoulli(1 - p)
    Draws(seed)    one generator a device, seeded like torch's own: the same numbers on a CPU as those would give

torch's global generators are one for all threads of a process, so two runs beside each other would take each other's
numbers. A base with dropout of its own knows no others: for each of its steps they are set to the states that belong to
the model (`Draws.lent`), and steps of such models take turns. The alternative, a seed for each layer and step, would
change what every earlier run drew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TURN = threading.RLock()  # of torch's global generators, among the threads that set their states


class Draws:
    """The generators of a model's adapters. `dropout`: whether they draw in training, `device`: where, `base`: whether
    the base draws too, from torch's own.
    """

    def __init__(self, seed: int, device: torch.device, dropout: bool = True, base: bool = False):
        self.seed, self.device, self.dropout = seed, device, dropout
        self._generators: dict[str, torch.Generator] = {}
        self.on(device)
        kinds = {"cpu", device.type} if base else set()
        self.lent = {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device.type not in self._generators:
            self._generators[device.type] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device.type]

    def states(self) -> dict[str, Tensor]:
        """The state (uint8) of each generator, by its kind of device."""
        return {name: generator.get_state() for name, generator in self._generators.items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Put states back; those of devices that are not used here are passed over."""
        for name, state in states.items():
            if name in self._generators:
                self._generators[name].set_state(state)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Inside, torch's global generators are this model's; after it they are what they were before."""
        if not self.lent:
            yield
            return
        with TURN:
            outside = self._torch_states()
            self._set_torch_states(self.lent)
            try:
                yield
            finally:
                self.lent = self._torch_states()
                self._set_torch_states(outside)

    def _torch_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        return states if self.device.type == "cpu" else states | {"cuda": torch.cuda.get_rng_state(self.device)}

    def _set_torch_states(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def base_drops(config: Any) -> bool:
    """Whether a model of this config of transformers has dropout of its own in training."""
    options = config.to_dict().items()
    return any("drop" in name and isinstance(value, int | float) and value > 0 for name, value in options)


def draws_of(model: nn.Module) -> Draws | None:
    """The generators that the adapters of a model draw from; None where these are torch's own."""
    found = (vars(module).get("draws") for module in model.modules())
    return next((draws for draws in found if isinstance(draws, Draws)), None)


def dropout(x: Tensor, p: float, draws: Draws | None) -> Tensor:
    """x with each element zero with probability `p`, and the others divided by 1 - p."""
    if draws is None:
        return nn.functional.dropout(x, p)
    generator = draws.on(x.device)
    if x.device.type == "cpu":  # as torch computes it there, to the bit
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return x * mask * (1 / (1 - p))


def recomputation(draws: Draws | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward pass and of its recomputation (torch.utils.checkpoint's `context_fn`): the second draws the
    numbers of the first.
    """
    kept: dict[str, Tensor] = {}

    @contextmanager
    def first() -> Iterator[None]:
        if draws is not None and draws.dropout:
            kept.update(draws.states())
        yield

    @contextmanager
    def again() -> Iterator[None]:
        if not kept or draws is None:
            yield
            return
        now = draws.states()
        draws.set_states(kept)
        try:
            yield
        finally:
            draws.set_states(now)

    return first(), again()
