"""The optimizer of a run: AdamW over the adapters, in two groups.

    A, B          weight decay as asked for
    magnitudes    none: pulled to 0 they would shrink the base too

The alternative, one group, decays what DoRA means to learn apart from direction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qlora.layers.attach import adapter_parameters, named_adapters
from qlora.optim.adamw import PagedAdamW
from qlora.specs import OptimizerSpec


def adapter_optimizer(model: nn.Module, spec: OptimizerSpec, folder: str | Path | None = None) -> PagedAdamW:
    """AdamW over the adapters of `model`; what of its state is spilled lies on the disk of `folder`."""
    magnitudes = {id(adapter.magnitude) for _, adapter in named_adapters(model)}
    parameters = adapter_parameters(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) not in magnitudes], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if id(p) in magnitudes], "weight_decay": 0.0},
    ]
    return PagedAdamW(
        [group for group in groups if group["params"]],
        spec.learning_rate,
        spec.betas,
        spec.eps,
        memory=spec.memory,
        state=spec.state,
        folder=folder,
    )
