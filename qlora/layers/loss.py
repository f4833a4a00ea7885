"""The causal language-model loss, summed over the labels of a batch that count.

    loss = sum over labels of -log softmax(head(h[i]))[label i]        float32

The sum, not the mean, leaves here: only the training loop knows the number of target tokens of the whole optimizer step
(a mean of means weighs a token by the size of the micro-batch it fell into).

On a small model with a large vocabulary the head is the largest product there is, and its logits the largest tensor. So
the head runs only where a label counts, CHUNK labels at a time; a frozen head's gradient d loss / d h =
(softmax - onehot) W is taken in the same pass (as Liger does it on a GPU), and no [tokens, vocabulary] tensor ever
lives. The alternative, the loss of the model's own forward, is kept for models that cannot be split
(`qlora.layers.forward_mode`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora.data.batch import Batch
from qlora.layers.forward import final_scaling, head_logits, target_logits, target_states
from qlora.layers.forward_mode import forward_mode
from qlora.layers.weight import multiply_frozen
from qlora_kernels import backends, ops

# Labels at a time, whole tiles of 12, 16 and 32 alike: their logits are 28 MB of bf16 for a vocabulary of 49k, and the
# head is read once for them.
CHUNK = 288
# On a card more: below some 300 labels it waits for the head to be read. At most so many logits, 270 MB in bf16.
CARD_CHUNK, CARD_LOGITS = 1024, 1 << 27


def chunk_size(kind: str, vocabulary: int) -> int:
    """How many labels at a time on a device of this kind."""
    return CHUNK if kind != "cuda" else max(CHUNK, min(CARD_CHUNK, CARD_LOGITS // vocabulary))


def _chunks(states: Tensor, vocabulary: int) -> Iterator[slice]:
    size = chunk_size(backends.kind_of(states.device), vocabulary)
    return (slice(start, start + size) for start in range(0, states.shape[0], size))


def logit_chunks(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [k, vocabulary], labels [k]) of a batch, CHUNK labels at a time."""
    mode = forward_mode(model)
    if not (mode.split and isinstance(model, PreTrainedModel)):
        yield target_logits(model, batch, mode.apart)
        return
    states, labels = target_states(model, batch, mode)
    for part in _chunks(states, model.config.get_text_config().vocab_size):
        yield head_logits(model, states[part]), labels[part]


class HeadLoss(torch.autograd.Function):
    """sum_i -log softmax(f(states W^T + bias))[label i] for a frozen W, f as in `final_scaling`. Saves d loss /
    d states alone.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        n, vocabulary = states.shape[0], weight.shape[0]
        rows = chunk_size(backends.kind_of(states.device), vocabulary)
        buffer = backends.empty(min(n, rows), vocabulary, like=states)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        losses = states.new_empty(n, dtype=torch.promote_types(states.dtype, torch.float32))
        for part in _chunks(states, vocabulary):
            logits = buffer[: states[part].shape[0]]
            multiply_frozen(logits, states[part], weight, transposed=True)
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            slope = None
            if cap is not None:
                bent = logits.div_(cap).tanh_()
                slope = 1 - bent.square()
                logits = bent.mul_(cap)
            losses[part] = ops.cross_entropy_(logits, labels[part])
            if gradient is not None:
                if slope is not None:
                    logits *= slope
                multiply_frozen(gradient[part], logits, weight, transposed=False)
        if gradient is not None:
            ctx.save_for_backward(gradient if scale == 1.0 else gradient.mul_(scale))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None, None


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """The summed token loss of a batch, a float32 scalar with a graph (0 without one if no label counts)."""
    mode = forward_mode(model)
    if not (mode.split and isinstance(model, PreTrainedModel)):
        logits, labels = target_logits(model, batch, mode.apart)
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    states, labels = target_states(model, batch, mode)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        states = states.float() if backends.is_widened(states) else states
        return HeadLoss.apply(states, head.weight, head.bias, labels, *final_scaling(model))

    def loss(states: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head_logits(model, states).float(), labels, reduction="sum")

    # A head that learns, itself or by an adapter: its logits are computed again in the backward pass, a chunk at a
    # time.
    vocabulary = model.config.get_text_config().vocab_size
    chunks = _chunks(states, vocabulary)
    parts = [checkpoint(loss, states[part], labels[part], use_reentrant=False) for part in chunks]
    return torch.stack(parts).sum() if parts else states.sum() * 0
