"""Parameters of every odd kind, gradients for them, and comparisons to the bit: shared by the optimizer's tests."""

from __future__ import annotations

import torch

SHAPES = [(16, 57), (153, 16), (57,), (3,), (110, 100), (), (7, 5), (0, 3), (5000,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return [*made, torch.nn.Parameter(torch.randn(40, 30, generator=generator).to(dtype).t())]  # not contiguous


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.0, "lr": 3e-3, "betas": (0.8, 0.95)}]


OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}


def gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """Random gradients of very different sizes, clipped; now and then a parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for number, p in enumerate(params):
        spread = 10.0 ** torch.randint(-4, 2, (), generator=generator).item()
        gradient = (torch.randn(p.shape, generator=generator) * spread).to(p.dtype)
        p.grad = None if (step + number) % 7 == 0 else gradient
    torch.nn.utils.clip_grad_norm_(params, 1.0)


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def same_state(one: dict, two: dict) -> bool:
    """Two state_dicts, to the bit, with dtypes and strides."""

    def entries(packed: dict) -> dict:
        return {(i, name): value for i, entry in packed["state"].items() for name, value in entry.items()}

    a, b = entries(one), entries(two)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and (a[k].dtype, a[k].stride()) == (b[k].dtype, b[k].stride()) for k in a
    )
