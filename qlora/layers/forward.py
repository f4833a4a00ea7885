"""A model run on a batch, up to what predicts the tokens that count: packed, padded, or by the model's own forward.

    packed    decoder(input_ids [1, T], position_ids, cu_seq_lens_q, ...) -> states [n, width], tokens [n]
    padded    decoder(input_ids [b, t], attention_mask)                   -> the same
    whole     model(input_ids [b, t], attention_mask)                     -> logits [n, vocabulary], tokens [n]
    apart     model(input_ids [1, t]) of each example                     -> the same

In the first two the decoder and the head run apart, so that the head runs only where a label counts. The alternative,
the model's own forward on everything, computes logits that nobody asks for; it is left to models without such parts.
`qlora.layers.forward_mode` decides between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.data.batch import IGNORE_INDEX, Batch, PaddedBatch
from qlora.layers import attention
from qlora.layers.weight import multiply_frozen
from qlora_kernels import backends

# On a CPU a long row is filled up to a multiple of ROUND tokens: oneDNN compiles its kernels anew for each number of
# rows, which takes longer than the products of a few more.
ROUND = 64
PAGEABLE = 64 << 10  # bytes that CUDA copies without waiting (CUDA runtime API, "API synchronization behavior")


@dataclass(frozen=True)
class ForwardMode:
    """How a model runs in training. `split`: its decoder and its head apart; `packed` (then also split): the examples
    in one row without padding; `apart`: each example by itself, because the model sees padding; `reason`: why it is
    not packed.
    """

    split: bool
    packed: bool
    apart: bool = field(default=False, kw_only=True)
    reason: str = field(default="", compare=False)

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.batches}{why}"

    @property
    def batches(self) -> str:
        """What a batch is, in words."""
        if self.packed:
            return "packed without padding"
        return "one at a time" if self.apart else "padded to one length"


def target_states(model: PreTrainedModel, batch: Batch, mode: ForwardMode) -> tuple[Tensor, Tensor]:
    """Run the decoder.

    Returns:
        The states [n, width] at the n positions whose label counts, and these labels [n].
    """
    device = next(model.parameters()).device
    states, labels = (_packed_states if mode.packed else _padded_states)(model, batch, device)
    # Asked of the labels on the CPU, so that nothing waits for a GPU.
    wanted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return states.index_select(0, sent(wanted, device)), sent(labels[wanted], device)


def _packed_states(model: PreTrainedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [T, width] and labels [T] of the packed row."""
    if backends.kind_of(device) != "cuda" and batch.tokens >= 8 * ROUND:
        batch = batch.filled(ROUND)
    states = model.get_decoder()(
        input_ids=sent(batch.input_ids, device),
        position_ids=sent(batch.position_ids, device),
        attention_mask=attention.NO_MASK,
        **attention.borders(batch.cu_seqlens, device),
        use_cache=False,
    ).last_hidden_state
    return states[0], batch.labels[0]


def _padded_states(model: PreTrainedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [b * t, width] and labels [b * t] of the rectangle."""
    rows = batch.padded()
    states = model.get_decoder()(
        input_ids=sent(rows.input_ids, device), attention_mask=_mask(rows, device), use_cache=False
    ).last_hidden_state
    return states.flatten(0, 1), rows.labels.flatten()


def _mask(rows: PaddedBatch, device: torch.device) -> Tensor | None:
    """The mask of the padding. On the meta device None without any, since nobody can look at its values there."""
    full = device.type == "meta" and bool(rows.attention_mask.all())
    return None if full else sent(rows.attention_mask, device)


def sent(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. The driver copies a little pageable memory aside and returns; for more it waits
    until the card has come that far, so that goes through pinned memory, which torch keeps until it was read.
    """
    if device.type == "cuda" and t.numel() * t.element_size() > PAGEABLE:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def target_logits(model: nn.Module, batch: Batch, apart: bool = False) -> tuple[Tensor, Tensor]:
    """Run the model's own forward, on the padded examples or `apart`, on each by itself.

    Returns:
        Logits [n, vocabulary] at the n positions whose label counts, and these labels [n].
    """
    if apart:
        parts = [target_logits(model, one) for one in _each(batch)]
        return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])
    rows, device = batch.padded(), next(model.parameters()).device
    positions = (rows.labels != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    labels = rows.labels[:, positions].to(device)
    inputs: dict[str, Any] = {"input_ids": rows.input_ids.to(device), "attention_mask": _mask(rows, device)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=positions.to(device)).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions.to(device)]
    counted = labels != IGNORE_INDEX
    return logits[counted], labels[counted]


def _each(batch: Batch) -> Iterator[Batch]:
    """The examples of a batch, each as a batch of one."""
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        input_ids, positions, labels = (
            row[:, start:end] for row in (batch.input_ids, batch.position_ids, batch.labels)
        )
        borders = torch.tensor([0, end - start], dtype=torch.int32)
        yield Batch(input_ids, positions, borders, labels, int((labels != IGNORE_INDEX).sum()), end - start)


def final_scaling(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, cap): the logits are cap * tanh(scale * head(h) / cap), or scale * head(h) where there is no cap."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The logits [n, vocabulary] of states [n, width]."""
    scale, cap = final_scaling(model)
    head = model.get_output_embeddings()
    learns = torch.is_grad_enabled() and (states.requires_grad or any(p.requires_grad for p in head.parameters()))
    if backends.is_widened(states) and type(head) is nn.Linear and not learns:
        logits = states.new_empty(states.shape[0], head.weight.shape[0], dtype=torch.float32)
        multiply_frozen(logits, states.float(), head.weight, transposed=True)
        logits = logits if head.bias is None else logits + head.bias
    else:
        logits = head(states)
    logits = logits if scale == 1.0 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)
