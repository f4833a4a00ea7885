"""Examples -> a packed batch: one row of tokens without padding, and the borders between the examples in it.

    input_ids     [1, T]     the tokens of all examples, T = t0 + t1 + ...
    position_ids  [1, T]     0, 1, ... and again from 0 where an example begins
    cu_seqlens    [n + 1]    the borders 0, t0, t0 + t1, ..., T
    labels        [1, T]     what is to be predicted AT each position: the next token of the example, or IGNORE_INDEX

The shift by one is made here, where the examples are still apart: no label looks over a border, and whoever reads a
batch compares the logits at a position with the label at the same position. (transformers' own `labels` are the tokens
themselves, shifted inside the model; as `shift_labels` it takes ours.)

The alternative, a rectangle padded to the longest example, computes the padding too. It is made from the packed row
(`Batch.padded`) for models that cannot run packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # the label that does not count, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Example:
    """The tokens of one example. `loss_mask[i]`: token i is predicted from those before it, and counts in the loss;
    the first token has nothing before it and never counts. `place`: its file, and where it stands there, if known.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    place: tuple[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PaddedBatch:
    """The rectangle [b, t] of a batch, padded on the right. What is padding follows from length, never from a token."""

    input_ids: Tensor  # int64, 0 in the padding
    attention_mask: Tensor  # int64, 1 within the length
    labels: Tensor  # int64, as in Batch


@dataclass(frozen=True)
class Batch:
    """Packed examples on the CPU; shapes in the head of this module."""

    input_ids: Tensor  # int64
    position_ids: Tensor  # int64
    cu_seqlens: Tensor  # int32
    labels: Tensor  # int64
    target_tokens: int  # labels that count
    tokens: int  # of the examples

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return self.cu_seqlens.diff().tolist()

    def padded(self) -> PaddedBatch:
        """The same examples as rows of one length."""
        lengths = self.cu_seqlens.diff().long()
        present = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        input_ids = torch.zeros(present.shape, dtype=torch.int64)
        labels = torch.full(present.shape, IGNORE_INDEX)
        input_ids[present] = self.input_ids[0]
        labels[present] = self.labels[0]
        return PaddedBatch(input_ids, present.long(), labels)

    def filled(self, multiple: int) -> Batch:
        """The row filled up to a multiple of so many tokens, by one more example of zeros without labels. `tokens` and
        `target_tokens` stay those of the others.
        """
        missing = -self.input_ids.shape[1] % multiple
        if not missing:
            return self
        return replace(
            self,
            input_ids=F.pad(self.input_ids, (0, missing)),
            position_ids=torch.cat([self.position_ids, torch.arange(missing).unsqueeze(0)], dim=1),
            cu_seqlens=torch.cat([self.cu_seqlens, self.cu_seqlens[-1:] + missing]),
            labels=F.pad(self.labels, (0, missing), value=IGNORE_INDEX),
        )


def pack(examples: Sequence[Example]) -> Batch:
    """The batch of these examples, in their order."""
    lengths = [len(example.input_ids) for example in examples]
    input_ids = _row(chain.from_iterable(example.input_ids for example in examples), torch.int64)
    counts = _row(chain.from_iterable(_next_counts(example) for example in examples), torch.bool)
    labels = input_ids.roll(-1, dims=1).masked_fill(~counts, IGNORE_INDEX)
    return Batch(
        input_ids,
        _row(chain.from_iterable(map(range, lengths)), torch.int64),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        labels,
        target_tokens=int(counts.sum()),
        tokens=sum(lengths),
    )


def _row(values: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(values), dtype=dtype).unsqueeze(0)


def _next_counts(example: Example) -> tuple[bool, ...]:
    """For each position whether the token after it counts; there is none after the last."""
    return (*example.loss_mask[1:], False) if example.input_ids else ()


def by_length(examples: Sequence[Example], batch_size: int, tokens: int = 0) -> list[list[Example]]:
    """Cut into batches in which examples of like length are together: packed attention then runs several of them at
    once, and a model that cannot run packed is padded less.

    Args:
        tokens: short examples share a batch, more than `batch_size` of them, as far as they have no more than so many.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        fits = batches and (len(batches[-1]) + 1) * len(example.input_ids) <= tokens
        if batches and (len(batches[-1]) < batch_size or fits):
            batches[-1].append(example)
        else:
            batches.append([example])
    return batches
