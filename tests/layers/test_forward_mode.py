"""How a model runs: packed where it keeps examples apart, else padded; borders under transformers' own names."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from helpers import Largest
from tiny import CONFIGS, MORE, PADDED, adapted, build, by_transformers, examples
from transformers import DataCollatorWithFlattening
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from qlora.data.batch import IGNORE_INDEX, Example, pack
from qlora.errors import UserError
from qlora.layers import attention, forward
from qlora.layers.attach import adapter_parameters
from qlora.layers.forward import ForwardMode
from qlora.layers.forward_mode import choose_forward_mode, expected_forward_mode, forward_mode
from qlora.layers.loss import loss_sum
from qlora.models.info import info
from qlora.train.step import checkpoint_activations

PACKED = sorted({*CONFIGS, *MORE} - PADDED)


def loss_and_gradients(model: torch.nn.Module, data: list[Example]) -> list[torch.Tensor]:
    loss = loss_sum(model, pack(data))
    return [loss.detach(), *torch.autograd.grad(loss, adapter_parameters(model))]


def test_borders_have_transformers_names():
    assert attention.Borders.__annotations__.keys() == FlashAttentionKwargs.__annotations__.keys()


@pytest.mark.parametrize("name", PACKED)
def test_borders_reach_every_attention(monkeypatch, name):
    model, seen = build(name), []
    assert forward_mode(model).packed

    def spy(module, query, key, value, attention_mask, **options):
        seen.append((attention_mask, {name: options[name] for name in attention.Borders.__annotations__}))
        return attention.attend(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, spy)
    loss_sum(model, pack(examples((12, 6), (5, 3), (9, 8))))
    assert len(seen) == model.config.num_hidden_layers
    for mask, borders in seen:
        assert mask is attention.NO_MASK and borders["max_length_q"] == borders["max_length_k"] == 12
        for cu_seqlens in (borders["cu_seq_lens_q"], borders["cu_seq_lens_k"]):
            assert cu_seqlens.tolist() == [0, 12, 17, 26]
            assert cu_seqlens.dtype == torch.int32 and cu_seqlens.device.type == "cpu"


@pytest.mark.parametrize("name", PACKED)
def test_gradient_checkpointing_keeps_the_borders(name):
    """The layers run again in the backward pass, with their borders and, where they have dropout, the same mask."""
    data, found = examples((12, 6), (5, 3), (9, 8)), []
    for checkpointing in (False, True):
        model = adapted(build(name), "lora")
        if checkpointing:
            checkpoint_activations(model)
        assert forward_mode(model.train()).packed
        torch.manual_seed(3)
        found.append(loss_and_gradients(model, data))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", PACKED)
def test_nothing_of_all_pairs_is_built(name):
    model, data = adapted(build(name), "lora"), examples(*((10, 1),) * 120)
    forward_mode(model)
    with Largest() as largest:
        loss_and_gradients(model, data)
    assert 1200 * 64 <= largest.elements < 1200 * 1200


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_padded_is_transformers(name):
    """The same model on the same examples, forced either way: the loss and every gradient."""
    model, data = adapted(build(name), "dora"), examples((12, 6), (5, 3), (9, 8), (1, 0))
    expected = by_transformers(model, pack(data))
    results = [[expected.detach(), *torch.autograd.grad(expected, adapter_parameters(model))]]
    for packing in ("off", "on"):
        choose_forward_mode(model, packing)
        results.append(loss_and_gradients(model, data))
    whole, padded, packed = results
    scale = max(gradient.abs().max().item() for gradient in whole[1:])
    for theirs, one, other in zip(whole, padded, packed, strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(other, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", sorted({*PACKED} - {"mixtral"}))  # whose router asks which experts were chosen
def test_nothing_asks_the_device_for_a_value(name):
    """On a GPU each such question would wait for all that was sent there. Tensors on the meta device have no values."""
    model = build(name).to("meta")
    assert expected_forward_mode(model) == forward_mode(model) == ForwardMode(split=True, packed=True)
    assert loss_sum(model, pack(examples((12, 6), (5, 3)))).is_meta


def test_packing_can_be_forced():
    model = build("llama")
    assert choose_forward_mode(model) == choose_forward_mode(model, "on") == ForwardMode(split=True, packed=True)
    assert forward_mode(model).packed and model.config._attn_implementation == attention.NAME
    assert choose_forward_mode(model, "off") == forward_mode(model) == ForwardMode(split=True, packed=False)
    assert model.config._attn_implementation == "sdpa" and str(forward_mode(model)).startswith("padded to one length")
    assert str(choose_forward_mode(model, "auto")) == "packed without padding"
    with pytest.raises(UserError, match="packing=yes: must be one of auto, on, off"):
        choose_forward_mode(model, "yes")


@pytest.mark.parametrize(
    "name, reason",
    [
        *((name, "its attention (eager) cannot be replaced") for name in ("bloom", "gemma2", "gpt_oss")),
        *((name, "its layers do not keep packed examples apart") for name in ("lfm2", "qwen3_next")),
    ],
)
def test_insisting_on_what_a_model_cannot_do_is_one_line(name, reason):
    model = build(name)
    with pytest.raises(UserError) as caught:
        choose_forward_mode(model, "on")
    (line,) = caught.value.problems
    assert line == f"packing=on: {type(model).__name__} cannot run packed: {reason}. Use `packing=auto`."
    assert name in PADDED and model.config._attn_implementation != attention.NAME


def test_a_model_on_another_attention_is_left_on_it():
    model = build("llama")
    model.set_attn_implementation("eager")
    assert choose_forward_mode(model) == ForwardMode(True, False) and model.config._attn_implementation == "eager"
    assert "eager" in forward_mode(model).reason


def test_a_model_that_loses_the_borders_on_the_way_is_padded():
    """It is noticed; and if it were not, the layers would raise rather than look over the borders."""
    model = build("llama")
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def deaf(*args, forward=forward, **options):
            known = inspect.signature(forward).parameters
            return forward(*args, **{name: value for name, value in options.items() if name in known})

        layer.self_attn.forward = deaf
    assert forward_mode(model) == ForwardMode(True, False)
    model.set_attn_implementation(attention.NAME)
    info(model).mode = ForwardMode(True, True)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        loss_sum(model, pack(examples((12, 6), (5, 3))))


def test_a_packed_model_takes_what_transformers_own_collator_makes():
    model, data = build("llama"), examples((12, 6), (5, 3), (9, 8))
    expected = loss_sum(model, pack(data)) / pack(data).target_tokens
    features = [
        {
            "input_ids": e.input_ids,
            "labels": [i if m else IGNORE_INDEX for i, m in zip(e.input_ids, e.loss_mask, strict=True)],
        }
        for e in data
    ]
    features = [{name: list(value) for name, value in feature.items()} for feature in features]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features, return_tensors="pt")
    torch.testing.assert_close(model(**theirs, use_cache=False).loss, expected, rtol=1e-5, atol=1e-5)


def test_memory_that_runs_out_is_not_taken_for_a_refusal_to_pack():
    """Else a run on a card that is nearly full would be padded, without a word."""
    model = build("llama")

    def full(module, args, kwargs):
        if kwargs.get("cu_seq_lens_q") is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.get_decoder().register_forward_pre_hook(full, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        choose_forward_mode(model)
    handle.remove()
    assert choose_forward_mode(model).packed


def test_long_copies_to_a_card_are_pinned(monkeypatch):
    """Of more than 64 KB; for these CUDA would wait. A tensor on a card that is not there is not made."""
    said = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: said.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: said.append(str(device)) or self)
    for count, device in ((8192, "cuda:0"), (8193, "cuda:0"), (8193, "cpu")):
        forward.sent(torch.zeros(count, dtype=torch.int64), torch.device(device))
    assert said == ["cuda:0", "pinned", "cuda:0", "cpu"]


@pytest.mark.parametrize("packed", [True, False])
def test_all_that_is_long_of_a_batch_goes_to_a_card_pinned(monkeypatch, packed):
    """Tokens, their positions or mask, the places that count and their labels; the card is not there."""
    batch = pack(examples((70_000, 69_999)))
    pinned, sent, card = [], [], SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: sent.append(self) or self)

    def decoder(input_ids, **options):
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 1))

    model = SimpleNamespace(parameters=lambda: iter([card]), get_decoder=lambda: decoder)
    forward.target_states(model, batch, ForwardMode(True, packed))
    large = [t for t in sent if t.numel() * t.element_size() > 64 << 10]
    assert len(large) == 4 and [id(t) for t in large] == [id(t) for t in pinned]
