"""The states of every random generator that a run draws from, as JSON: torch (all devices), Python, numpy, and the
model's own, from which its adapters draw (`layers.dropout`). Where the base draws too, torch's are the model's own.

A step that is taken again, an evaluation, and a resumed run put them back, so each draws what an undisturbed run draws.
The alternative, seeding from the number of the step, would change the masks of dropout with how a step is cut.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from qlora.errors import UserError, problem
from qlora.layers.dropout import TURN, draws_of


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all devices), to the numbers of `transformers.set_seed`.

    Theirs imports every backend that transformers can find, so a broken bitsandbytes would end a run that needs none.
    """
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_states(model: nn.Module | None = None) -> dict[str, Any]:
    """The states of torch's generators (all devices), Python's, numpy's, and those of `model`, as JSON."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    array = numpy.random.get_state(legacy=False)
    array["state"]["key"] = array["state"]["key"].tolist()
    draws = None if model is None else draws_of(model)
    lent = {} if draws is None else draws.lent
    if draws is not None and "cuda" in lent:
        cuda[draws.device.index or 0] = lent["cuda"]
    here = {"torch": _text(lent.get("cpu", torch.get_rng_state())), "cuda": [_text(state) for state in cuda]}
    own = {} if draws is None else {"adapters": {name: _text(state) for name, state in draws.states().items()}}
    return here | {"python": random.getstate(), "numpy": array} | own


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn inside is drawn again after it: torch's generators, Python's and numpy's are put back."""
    with TURN:
        states = random_states()
        try:
            yield
        finally:
            set_random_states(states)


def set_random_states(states: Mapping[str, Any], model: nn.Module | None = None) -> None:
    """Put back what `random_states` returned; a device that is no longer there is passed over.

    States from before adapters had generators of their own: on a CPU these drew the numbers that theirs draw, unless
    the base has dropout too.

    Raises:
        UserError: these are such states, and dropout would draw other numbers from here on.
    """
    torch.set_rng_state(_bytes(states["torch"]))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_bytes(state), device)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    array = {**states["numpy"], "state": dict(states["numpy"]["state"])}
    array["state"]["key"] = numpy.array(array["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(array)
    draws = None if model is None else draws_of(model)
    if model is None or draws is None:
        return
    if "adapters" not in states and draws.dropout and (draws.device.type != "cpu" or draws.lent):
        rule = "was written by a version whose dropout drew other numbers"
        raise UserError(problem("checkpoint", "(older)", rule, "Resume with the version it began with, or start anew"))
    draws.set_states({name: _bytes(state) for name, state in states.get("adapters", {"cpu": states["torch"]}).items()})
    lent = dict(zip(("cpu", "cuda"), [states["torch"], *states["cuda"][draws.device.index or 0 :]], strict=False))
    draws.lent |= {name: _bytes(state) for name, state in lent.items() if name in draws.lent}


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
