"""The packed batch: positions, borders, labels; the rectangle made from it; the row filled up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import examples
from transformers import DataCollatorWithFlattening

from qlora.data.batch import IGNORE_INDEX, Example, by_length, pack
from qlora.data.tokenize import tokenize

TWO = [Example((5, 6, 7), (False, True, True)), Example((8, 9), (False, False)), Example((3,), (False,))]


def test_a_packed_batch_written_out():
    batch = pack(TWO)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6] and batch.cu_seqlens.dtype == torch.int32
    assert batch.labels.tolist() == [[6, 7, -100, -100, -100, -100]]
    assert (batch.target_tokens, batch.tokens, batch.lengths) == (2, 6, [3, 2, 1])
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.labels.dtype == torch.int64


def test_no_label_looks_over_a_border():
    """Not even that of a first token which somebody says counts: nothing stands before it."""
    batch = pack([Example((5, 6), (True, True)), Example((7, 8), (True, True))])
    assert batch.labels.tolist() == [[6, -100, 8, -100]] and batch.target_tokens == 2


def test_it_is_the_batch_of_transformers_own_collator():
    """But for the labels, which it leaves to the model to shift."""
    data = examples((12, 6), (5, 3), (9, 8), (1, 0))
    features = [
        {
            "input_ids": list(e.input_ids),
            "labels": [i if m else IGNORE_INDEX for i, m in zip(e.input_ids, e.loss_mask, strict=True)],
        }
        for e in data
    ]
    theirs, ours = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features, return_tensors="pt"), pack(data)
    assert torch.equal(ours.input_ids, theirs["input_ids"]) and torch.equal(ours.position_ids, theirs["position_ids"])
    assert torch.equal(ours.cu_seqlens, theirs["cu_seq_lens_q"]) and ours.cu_seqlens.dtype == torch.int32
    assert torch.equal(ours.labels[:, :-1], theirs["labels"][:, 1:])


def test_padded_and_back():
    data = examples((12, 6), (5, 3), (9, 8), (9, 2), (1, 0))
    batch = pack(data)
    rows = batch.padded()
    assert rows.input_ids.shape == rows.attention_mask.shape == rows.labels.shape == (5, 12)
    assert rows.input_ids.dtype == rows.attention_mask.dtype == rows.labels.dtype == torch.int64
    present = rows.attention_mask.bool()
    assert rows.attention_mask.sum(1).tolist() == batch.lengths == [12, 5, 9, 9, 1]
    assert torch.equal(rows.attention_mask, present.long().sort(1, descending=True).values)  # padding is on the right
    assert torch.equal(rows.input_ids[present], batch.input_ids[0]) and torch.equal(
        rows.labels[present], batch.labels[0]
    )
    assert set(rows.input_ids[~present].tolist()) == {0} and set(rows.labels[~present].tolist()) == {IGNORE_INDEX}
    again = [
        Example(tuple(ids[:length]), (False, *(label != IGNORE_INDEX for label in labels[: length - 1])))
        for ids, labels, length in zip(rows.input_ids.tolist(), rows.labels.tolist(), batch.lengths, strict=True)
    ]
    assert again == data


def test_padding_is_known_by_length_so_pad_may_be_eos(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    talks = [("Capital of France?", "Paris."), ("a", "b c d e f g"), ("", "")]
    data = tokenize([{"prompt": prompt, "completion": answer} for prompt, answer in talks], tokenizer).examples
    batch = pack(data)
    rows = batch.padded()
    for example, ids, mask, labels in zip(data, rows.input_ids, rows.attention_mask, rows.labels, strict=True):
        length = len(example.input_ids)
        assert ids.tolist() == [*example.input_ids, *[0] * (len(ids) - length)]
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        following = zip(example.input_ids[1:], example.loss_mask[1:], strict=True)
        assert labels.tolist()[: length - 1] == [token if counts else -100 for token, counts in following]
        assert set(labels.tolist()[length - 1 :]) <= {-100}
        assert tokenizer.eos_token_id in labels.tolist()  # the end of the turn is still learned
    assert batch.target_tokens == sum(sum(example.loss_mask) for example in data)
    assert batch.tokens == sum(len(example.input_ids) for example in data)


@pytest.mark.parametrize("multiple, width", [(4, 8), (6, 6), (64, 64)])
def test_a_row_filled_up_has_one_more_example_of_zeros_that_counts_nothing(multiple, width):
    batch, missing = pack(TWO), width - 6
    filled = batch.filled(multiple)
    assert filled.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, *[0] * missing]]
    assert filled.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, *range(missing)]]
    assert filled.cu_seqlens.tolist() == ([0, 3, 5, 6, width] if missing else [0, 3, 5, 6])
    assert filled.labels.tolist() == [[6, 7, -100, -100, -100, -100, *[-100] * missing]]
    assert filled.cu_seqlens.dtype == torch.int32 and (filled.target_tokens, filled.tokens) == (2, 6)


def test_a_batch_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack(TWO).tokens = 3


def test_by_length_keeps_every_example_and_the_order_of_equal_ones():
    data = examples((9, 1), (3, 1), (9, 2), (4, 1), (3, 2))
    assert by_length(data, 2) == [[data[1], data[4]], [data[3], data[0]], [data[2]]]
    lengths = [[len(example.input_ids) for example in group] for group in by_length(data, 1, tokens=12)]
    assert sorted(n for group in lengths for n in group) == sorted(len(example.input_ids) for example in data)
    assert max(len(group) for group in lengths) > 1
    assert all(len(group) == 1 or len(group) * max(group) <= 12 for group in lengths)
