"""The causal language-model loss, summed over the target tokens of a batch.

    loss = sum over targets of -log softmax(logits[i - 1])[token i]        float32

The sum, not the mean, leaves here: only the training loop knows the number of target tokens of the whole optimizer step
(a mean of means weighs a token by the size of the micro-batch it fell into). The head runs only at the positions where
some row of the batch has a target; on a small model with a large vocabulary the head is the largest product there is.
"""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a token that does not count, as in torch.nn.functional.cross_entropy


def target_logits(model: nn.Module, batch) -> tuple[Tensor, Tensor]:
    """Run the model on a `data.Batch`; return logits [n, vocabulary] and tokens [n] for the n target tokens in it.

    Labels are not shifted in the batch: the logits that predict token i stand at position i - 1.
    """
    following = batch.labels[:, 1:]
    # Found before the batch moves: on a GPU the length of `positions` would be a synchronization.
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


def loss_sum(model: nn.Module, batch) -> Tensor:
    """The summed token loss of a batch, a float32 scalar with a graph (0 without one if the batch has no target)."""
    logits, tokens = target_logits(model, batch)
    return F.cross_entropy(logits.float(), tokens, reduction="sum")
