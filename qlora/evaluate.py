"""Loss, perplexity and token accuracy on held-out examples.

    loss = sum of token losses / target tokens      perplexity = exp(loss)
    token accuracy = labels that the largest logit names / target tokens

Examples of like length share a batch; the sums do not depend on the batches. The model comes back in the mode it was
in, and the random states are the caller's: a run that evaluates more often is the same run.
The alternative, a mean over batches, depends on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.data.batch import Batch, Example, by_length, pack
from qlora.errors import UserError, problem
from qlora.layers.loss import logit_chunks
from qlora.models.limits import model_limits, refuse_tokens
from qlora.train.rng import undisturbed


@dataclass(frozen=True)
class EvalResult:
    """Means over `target_tokens` tokens."""

    loss: float
    perplexity: float
    token_accuracy: float
    target_tokens: int


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int = 4,
    *,
    before_batch: Callable[[], None] | None = None,
) -> EvalResult:
    """Evaluate `model` on `examples`.

    Args:
        model: it comes back in the mode it was in.
        examples: at least one with a token that counts.
        batch_size: examples computed at once.
        before_batch: called before each batch; what it raises ends the evaluation.

    Raises:
        UserError: there is nothing to evaluate on, an example does not fit the model, or the loss is no finite number.
    """
    if not any(any(example.loss_mask) for example in examples):
        raise UserError(
            problem("data", f"{len(examples)} examples", "no token counts in the loss", "Give data with answers")
        )
    if isinstance(model, PreTrainedModel):
        refuse_tokens(model_limits(model), examples)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    loss, right = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    targets = 0
    try:
        # Not inference_mode: norms that adapters keep from here are used in training.
        with torch.no_grad(), undisturbed():
            for batch in by_length(examples, batch_size):
                if before_batch is not None:
                    before_batch()
                for lost, hit, count in token_sums(model, pack(batch)):
                    loss += lost
                    right += hit
                    targets += count
    finally:
        model.train(training)
    mean = loss.item() / targets
    if not math.isfinite(mean):
        rule = "is no finite number over the data to evaluate on"
        remedy = "Look for damaged weights or adapters, or compute in another `dtype` (fp16 overflows early)"
        raise UserError(problem("loss", mean, rule, remedy))
    return EvalResult(mean, math.exp(mean) if mean < 700 else math.inf, right.item() / targets, targets)


def token_sums(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(summed loss, right guesses, labels that count) of a batch, a chunk of them at a time."""
    for logits, labels in logit_chunks(model, batch):
        yield F.cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(-1) == labels).sum(), len(labels)
