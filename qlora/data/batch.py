"""TODO head of data.batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE = -100  # the label that transformers and cross_entropy leave out of the loss


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    targets: tuple[bool, ...]  # targets[i]: token i is predicted from those before it; targets[0] is never set


@dataclass
class Batch:
    input_ids: torch.Tensor  # [b, t] int64
    attention_mask: torch.Tensor  # [b, t] int64, 1 within the length
    labels: torch.Tensor  # [b, t] int64, the id itself (not shifted) where it is a target, -100 elsewhere
    target_tokens: int
    tokens: int  # without padding

    def to(self, device: torch.device | str) -> Batch:
        moved = (tensor.to(device) for tensor in (self.input_ids, self.attention_mask, self.labels))
        return Batch(*moved, self.target_tokens, self.tokens)


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Pad on the right to the longest example; `pad_id` may be any token, as length alone says what is padding."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        length, ids = len(example.ids), torch.tensor(example.ids, dtype=torch.int64)
        input_ids[row, :length] = ids
        attention_mask[row, :length] = 1
        labels[row, :length] = ids.masked_fill(~torch.tensor(example.targets, dtype=torch.bool), IGNORE)
    return Batch(input_ids, attention_mask, labels, int((labels != IGNORE).sum()), int(attention_mask.sum()))


def by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Cut into batches in which examples of like length are together, which pads less."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
