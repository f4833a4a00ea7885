"""What of a model a run does not train or does not pack, in words: nothing of that is silent.

    left alone       linear layers that stay dense and get no adapter, and why      (`layers.linear.left_alone`)
    other tensors    weights that are no linear layers: fused experts, above all
    unreached        adapters that a trial step gave no gradient                    (`train.trial`)

The alternative, to count what is trained only, lets "NF4 in blocks of 64" stand over a mixture of experts of which
nine tenths are in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from qlora.errors import shortened
from qlora.layers.attach import named_adapters
from qlora.layers.linear import NF4Linear, is_linear, left_alone
from qlora.models.info import info

SHARE = 0.005  # of the weights, below which other tensors are not worth a line


def untouched(model: PreTrainedModel) -> list[str]:
    """A line for each kind of what is there; none for most models."""
    lines = []
    reasons: dict[str, list[str]] = {}
    head = model.get_output_embeddings()
    for name, reason in left_alone(model).items():
        if model.get_submodule(name) is not head:  # which nobody expects in 4 bits
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines.append(f"{len(names)} linear layers stay dense without an adapter, {_alike(names)}: {reason}")
    tensors = other_tensors(model)
    size = sum(tensors.values())
    share = size / max(1, size + _linear_elements(model))
    if share >= SHARE:
        lines.append(
            f"{share:.0%} of the weights are no linear layers and stay dense without adapters: {_alike(tensors)}"
        )
    unreached = info(model).unreached
    if unreached:
        count = sum(1 for _ in named_adapters(model))
        lines.append(f"{len(unreached)} of {count} adapters get no gradient from two short texts: {_alike(unreached)}")
    return lines


def other_tensors(model: PreTrainedModel) -> dict[str, int]:
    """The elements of each frozen matrix, or stack of matrices, that is no linear layer, embedding or head, by name."""
    known = (nn.Embedding, nn.Linear, NF4Linear, nn.modules.conv._ConvNd)
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, known) and module is not head and not is_linear(module):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and not parameter.requires_grad:
                    found[f"{name}.{own}"] = parameter.numel()
    return found


def _linear_elements(model: nn.Module) -> int:
    return sum(
        m.in_features * m.out_features if isinstance(m, NF4Linear) else sum(p.numel() for p in m.parameters())
        for m in model.modules()
        if is_linear(m)
    )


def _alike(names: Iterable[str]) -> str:
    """Names with N for their numbers, each once."""
    return shortened(", ".join(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names)), 200)
