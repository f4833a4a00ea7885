"""How far a quantized model is from its 16-bit original: loss and KL on a few records, without loading the original.

    KL = mean over target tokens of sum p16 (log p16 - log p)      gap = loss - loss16

The 16-bit model is the same model with each quantized layer reading its weight from the checkpoint when it is called:
one tensor at a time. The KL tells what a loss does not:
damage can lower a loss. The alternative, to load the original too, takes four times the memory of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.data.batch import Batch, Example, by_length, pack
from qlora.layers.attach import disabled, named_adapters
from qlora.layers.linear import NF4Linear
from qlora.layers.loss import logit_chunks
from qlora.layers.weight import FrozenWeight
from qlora.models.originals import Originals

Chunk = tuple[Tensor, Tensor]  # logits [k, vocabulary], labels [k]


@dataclass(frozen=True)
class Gap:
    """Mean loss over `target_tokens` tokens of the 16-bit model, of the quantized base, and of the base with its
    adapter; `kl_*` their divergence from the 16-bit model.
    """

    loss16: float
    loss_base: float
    loss: float
    kl_base: float
    kl: float
    target_tokens: int


class _FromFile(nn.Module):
    """y = x Wt + bias with W read anew at every call."""

    def __init__(self, layer: NF4Linear, name: str, weights: Originals):
        super().__init__()
        self.bias, self.name, self.weights = layer.bias, name, weights

    def forward(self, x: Tensor) -> Tensor:
        weight = FrozenWeight(self.weights.weight(self.name, x.device))
        y = weight.matmul(x.reshape(-1, x.shape[-1]), transposed=True).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@contextmanager
def unquantized(model: nn.Module, weights: Originals) -> Iterator[None]:
    """The model with 16-bit weights in the place of its quantized layers, and without their adapters, while entered."""
    replaced: dict[str, nn.Module] = {}
    try:
        for name, layer in _quantized(model).items():
            replaced[name] = model.get_submodule(name)
            model.set_submodule(name, _FromFile(layer, name, weights))
        yield
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)


def can_measure(model: nn.Module, weights: Originals) -> bool:
    """Whether every quantized layer has its 16-bit weight."""
    return _quantized(model).keys() <= weights.there


def _quantized(model: nn.Module) -> dict[str, NF4Linear]:
    """The quantized layers by the names they have without adapters."""
    bases = {name: module.base for name, module in named_adapters(model)}
    inside = set(bases.values())
    layers = {name: module for name, module in model.named_modules() if module not in inside} | bases
    return {name: layer for name, layer in layers.items() if isinstance(layer, NF4Linear)}


@torch.no_grad()
def measure_gap(
    model: nn.Module, weights: Originals, examples: Sequence[Example], batch_size: int, fill: int = 0
) -> Gap:
    """The gap of a model in evaluation mode on these examples; the checkpoint is read once for each batch, which has
    `batch_size` examples, or as many as have `fill` tokens.
    """
    sums, count = torch.zeros(5, dtype=torch.float64), 0
    for group in by_length(examples, batch_size, fill):
        for found, tokens in _differences(model, weights, pack(group)):
            sums += found.double().cpu()
            count += tokens
    loss16, loss_base, kl_base, loss, kl = (sums / count).tolist()
    return Gap(loss16, loss_base, loss, kl_base, kl, count)


def _differences(model: nn.Module, weights: Originals, batch: Batch) -> Iterator[tuple[Tensor, int]]:
    """Sums over some target tokens at a time of: loss16, then loss and KL of the base, and of base with adapter."""
    with unquantized(model, weights):
        exact = _begun(logit_chunks(model, batch))
    with disabled(model):
        base = _begun(logit_chunks(model, batch))
    own = logit_chunks(model, batch)
    for (logits16, labels), (logits_base, _), (logits, _) in zip(exact, base, own, strict=True):
        logs16 = logits16.float().log_softmax(-1)
        found = [F.nll_loss(logs16, labels, reduction="sum")]
        for other in (logits_base, logits):
            logs = other.float().log_softmax(-1)
            found.append(F.nll_loss(logs, labels, reduction="sum"))
            found.append(F.kl_div(logs, logs16, log_target=True, reduction="sum"))
        yield torch.stack(found), len(labels)


def _begun(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same, with the first made already: with it the decoder has run, and what is left is the head."""
    return itertools.chain([next(chunks)], chunks)
