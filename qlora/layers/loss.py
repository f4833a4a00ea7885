"""The causal language-model loss, summed over the target tokens of a batch.

    loss = sum over targets of -log softmax(head(h[i - 1]))[token i]        float32

The sum, not the mean, leaves here: only the training loop knows the number of target tokens of the whole optimizer step
(a mean of means weighs a token by the size of the micro-batch it fell into).

On a small model with a large vocabulary the head is the largest product there is, and its logits the largest tensor. So
the head runs only where a target follows, CHUNK target tokens at a time; a frozen head's gradient d loss / d h =
(softmax - onehot) W is taken in the same pass (as Liger does it on a GPU), and no [tokens, vocabulary] tensor ever
lives. The layers run on the examples end to end, without padding (`qlora.attention`). Both ways part with the model's
own forward, so `layout_of` first compares them with it on two short examples, and a model that they do not reproduce
runs as transformers runs it, padded and whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora.layers import attention
from qlora.models.info import info
from qlora.models.transformers_seam import attention_implementation, takes_attention
from qlora_kernels import ops

IGNORED = -100  # the label of a token that does not count, as in torch.nn.functional.cross_entropy
# target tokens at a time: their logits are 25 MB of bf16 for a vocabulary of 49k, and the head is read once for them
CHUNK = 256
# On a CPU a row of examples is filled up to a multiple of ROUND tokens by an example of its own without targets: oneDNN
# compiles its kernels anew for each number of rows, which takes longer than the products of a few more.
ROUND = 64
# How far (in units of their spread) logits may lie from the model's own. An example that sees another, or a wrong
# position, moves them by tenths; rounding by less than this.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Layout:
    """How a model runs in training. `split`: its layers and its head apart; `packed`: examples end to end, without
    padding.
    """

    split: bool
    packed: bool


def target_states(model: nn.Module, batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Run the layers on a `data.Batch`; return the states [n, width] that predict its n target tokens, and these tokens
    [n].

    Labels are not shifted in the batch: the state that predicts token i stands at position i - 1.
    """
    device = next(model.parameters()).device
    layers = model.get_decoder()
    following = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    # Everything that asks for a value is asked of the batch on the CPU, and goes to a GPU without waiting for what runs
    # there.
    if layout.packed:
        present = batch.attention_mask.bool()
        lengths = present.sum(1).tolist()
        filler = -sum(lengths) % ROUND if device.type != "cuda" and sum(lengths) >= 8 * ROUND else 0
        positions = torch.cat([torch.arange(length) for length in [*lengths, filler]])
        ids, following = (
            F.pad(batch.input_ids[present], (0, filler)),
            F.pad(following[present], (0, filler), value=IGNORED),
        )
        states = layers(
            input_ids=_sent(ids.unsqueeze(0), device),
            position_ids=_sent(positions.unsqueeze(0), device),
            attention_mask=attention.bounds([*lengths, filler] if filler else lengths),
            use_cache=False,
        ).last_hidden_state
    else:
        states = layers(
            input_ids=_sent(batch.input_ids, device),
            attention_mask=_sent(batch.attention_mask, device),
            use_cache=False,
        ).last_hidden_state
        following = following.flatten()
    wanted = (following != IGNORED).nonzero().squeeze(1)
    return states.flatten(0, 1).index_select(0, _sent(wanted, device)), _sent(following[wanted], device)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. The driver copies pageable memory aside before this returns, so nothing has to
    be pinned or kept.
    """
    return t.to(device, non_blocking=True)


def target_logits(model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] by the model's own forward, and tokens [n], of the n target tokens in a batch."""
    following = batch.labels[:, 1:]
    positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    wanted = following[:, positions]
    device = next(model.parameters()).device
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=positions.to(device)).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions.to(device)]
    wanted = wanted.to(device)
    counted = wanted != IGNORED
    return logits[counted], wanted[counted]


def _final(model: nn.Module) -> tuple[float, float | None]:
    """(scale, cap): the logits are cap * tanh(scale * head(h) / cap), or scale * head(h) where there is no cap."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _logits(model: nn.Module, states: Tensor) -> Tensor:
    scale, cap = _final(model)
    logits = model.get_output_embeddings()(states)
    logits = logits if scale == 1.0 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(states: Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, states.shape[0], CHUNK))


def logit_chunks(model: nn.Module, batch) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [k, vocabulary], tokens [k]) of a batch, a chunk of target tokens at a time."""
    layout = layout_of(model)
    if not layout.split:
        yield target_logits(model, batch)
        return
    states, tokens = target_states(model, batch, layout)
    for part in _chunks(states):
        yield _logits(model, states[part]), tokens[part]


class HeadLoss(torch.autograd.Function):
    """sum_i -log softmax(f(states W^T + bias))[token i] for a frozen W, f as in `_final`. Saves d loss / d states
    alone.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        n, vocabulary = states.shape[0], weight.shape[0]
        buffer = states.new_empty(min(n, CHUNK), vocabulary)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        losses = states.new_empty(n, dtype=torch.promote_types(states.dtype, torch.float32))
        for part in _chunks(states):
            logits = torch.mm(states[part], weight.t(), out=buffer[: states[part].shape[0]])
            if bias is not None:
                logits += bias
            if scale != 1.0:
                logits *= scale
            slope = None
            if cap is not None:
                bent = logits.div_(cap).tanh_()
                slope = 1 - bent.square()
                logits = bent.mul_(cap)
            losses[part] = ops.cross_entropy_(logits, tokens[part])
            if gradient is not None:
                if slope is not None:
                    logits *= slope
                torch.mm(logits, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient if scale == 1.0 else gradient.mul_(scale))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None, None, None


def loss_sum(model: nn.Module, batch) -> Tensor:
    """The summed token loss of a batch, a float32 scalar with a graph (0 without one if the batch has no target)."""
    layout = layout_of(model)
    if not layout.split:
        logits, tokens = target_logits(model, batch)
        return F.cross_entropy(logits.float(), tokens, reduction="sum")
    states, tokens = target_states(model, batch, layout)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        return HeadLoss.apply(states, head.weight, head.bias, tokens, *_final(model))

    def loss(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(_logits(model, states).float(), tokens, reduction="sum")

    # A head that learns, itself or by an adapter: its logits are computed again in the backward pass, a chunk at a
    # time.
    parts = [checkpoint(loss, states[part], tokens[part], use_reentrant=False) for part in _chunks(states)]
    return torch.stack(parts).sum() if parts else states.sum() * 0


def layout_of(model: nn.Module) -> Layout:
    """How `model` runs in training, found at the first call by comparing with its own forward; kept in
    `model.qlora.mode`.
    """
    if info(model).mode is None:
        info(model).mode = _find_layout(model) if isinstance(model, PreTrainedModel) else Layout(False, False)
    return info(model).mode


@torch.no_grad()
def expected_layout(model: PreTrainedModel) -> Layout:
    """What `layout_of` will find, of a model on the meta device, where there are no numbers to compare; leaves it set
    up so.
    """
    layers = model.get_decoder()
    if model.get_output_embeddings() is None or layers is None or layers is model:
        return Layout(False, False)
    if _can_pack(model, layers):
        before, packed = attention_implementation(model), Layout(True, True)
        model.set_attn_implementation(attention.NAME)
        if _tried(model, _Probe(torch.ones(2, 12, dtype=torch.int64), (12, 7)), packed) is not None:
            return packed
        model.set_attn_implementation(before)
    return Layout(True, False)


@torch.no_grad()
def _find_layout(model: PreTrainedModel) -> Layout:
    layers = model.get_decoder()
    if model.get_output_embeddings() is None or layers is None or layers is model:
        return Layout(False, False)
    training = model.training
    model.eval()
    try:
        ids = torch.arange(24).mul_(7919).add_(13).remainder_(model.config.get_text_config().vocab_size).view(2, 12)
        probe = _Probe(ids, (12, 7))
        expected = torch.cat([target_logits(model, probe.alone(row))[0] for row in range(2)])
        if not _close(expected, _tried(model, probe, Layout(True, False))):
            return Layout(False, False)
        if not _can_pack(model, layers):
            return Layout(True, False)
        before = attention_implementation(model)
        model.set_attn_implementation(attention.NAME)
        packed = Layout(True, True)
        together = _tried(model, probe, packed)
        other = _tried(model, probe.with_first(ids[0, 0]), packed)
        second = slice(11, None)  # the logits of the second example must not notice what the first one is
        if _close(expected, together) and other is not None and _close(together[second], other[second], 0.25):
            return packed
        model.set_attn_implementation(before)
        return Layout(True, False)
    finally:
        model.train(training)


def _can_pack(model: PreTrainedModel, layers: nn.Module) -> bool:
    return (
        attention_implementation(model) == "sdpa"
        and takes_attention(model)
        and "position_ids" in inspect.signature(layers.forward).parameters
    )


class _Probe:
    """Two examples of these lengths, every token but the first a target; as much of a `data.Batch` as the functions
    above read.
    """

    def __init__(self, ids: Tensor, lengths: tuple[int, ...]):
        self.input_ids = ids
        self.attention_mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
        self.labels = ids.where(self.attention_mask.bool(), torch.tensor(IGNORED))

    def alone(self, row: int) -> _Probe:
        length = int(self.attention_mask[row].sum())
        return _Probe(self.input_ids[row : row + 1, :length], (length,))

    def with_first(self, token: Tensor) -> _Probe:
        """The same with another first example: `token` all over."""
        ids = self.input_ids.clone()
        ids[0] = token
        return _Probe(ids, tuple(self.attention_mask.sum(1).tolist()))


def _tried(model: PreTrainedModel, probe: _Probe, layout: Layout) -> Tensor | None:
    """Logits in this layout, or None where the architecture refuses it."""
    try:
        return _logits(model, target_states(model, probe, layout)[0])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return None  # another architecture's own code met what it does not know; it will run as it is


def _close(expected: Tensor, found: Tensor | None, share: float = 1.0) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    tolerance, wide = share * TOLERANCE[expected.dtype], expected.double()
    spread = (wide - wide.mean()).square().mean().sqrt()
    return bool((found.double() - wide).square().mean().sqrt() <= tolerance * spread)
