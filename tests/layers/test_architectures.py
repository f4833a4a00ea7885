"""Architectures that are not like Llama: what their own code does with layers, masks and outputs."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from helpers import relative
from tiny import SMALL, adapted, build, examples, random_model
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.rwkv.modeling_rwkv import RwkvModel

from qlora.data.batch import pack
from qlora.errors import UserError
from qlora.layers.attach import attach_adapters, named_adapters
from qlora.layers.forward import ForwardMode, target_logits
from qlora.layers.forward_mode import choose_forward_mode, expected_forward_mode, narrowed
from qlora.layers.fused import fuse
from qlora.layers.linear import NF4Linear, is_linear, left_alone, linear_names
from qlora.layers.loss import logit_chunks, loss_sum
from qlora.layers.transformers_code import weights_read
from qlora.models.info import info
from qlora.models.load import load_base
from qlora.run.untouched import untouched
from qlora.train.trial import trial_step

ENCODER = {**SMALL, "intermediate_size": 96}
GROUPED = {**ENCODER, "num_key_value_heads": 2}


def model_of(config: transformers.PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # large enough that what a token sees shows in the logits
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def mamba() -> nn.Module:
    return model_of(transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=320))


def test_layers_whose_weight_the_model_reads_stay_dense(tmp_path):
    mamba().save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype="fp32", device="cpu")
    alone = {name.rpartition(".")[2] for name in left_alone(model)}
    assert alone - {"lm_head"} == {"x_proj", "dt_proj", "out_proj"}
    assert isinstance(model.backbone.layers[0].mixer.in_proj, NF4Linear)
    attach_adapters(model, method="dora", rank=3)
    assert {name.rpartition(".")[2] for name, _ in named_adapters(model)} == {"in_proj"}
    trial_step(model)
    assert "6 linear layers stay dense without an adapter" in untouched(model)[0]


def test_a_layer_that_is_read_takes_no_adapter_by_name():
    with pytest.raises(UserError, match=r"targets=.*out_proj.*: takes no adapter: the model's own code reads"):
        attach_adapters(mamba(), targets=["out_proj", "in_proj"])


def test_reading_is_found_in_code_that_does_not_run_here():
    assert ("weights_proj", True) in weights_read(DeepseekV32Indexer)  # `.weight.dtype`
    assert ("attention.output", False) in weights_read(RwkvModel)  # of its blocks, in evaluation
    bloom = build("bloom")
    assert not left_alone(bloom) and len(linear_names(bloom)) == 8  # its slices of weights are an option that is off


def test_only_what_computes_a_linear_layer_is_one():
    router = Llama4Router(transformers.Llama4TextConfig(hidden_size=64, num_local_experts=4, num_experts_per_tok=1))
    assert isinstance(router, nn.Linear) and not is_linear(router)
    assert is_linear(FalconLinear(8, 8)) and not is_linear(nn.MultiheadAttention(8, 2).out_proj)


def test_tied_layers_stay_dense(tmp_path):
    """Zamba shares one attention block among its layers."""
    config = transformers.ZambaConfig(
        **{**SMALL, "num_hidden_layers": 4},
        intermediate_size=96,
        attention_hidden_size=128,
        attention_head_dim=32,
        num_key_value_heads=4,
        mamba_d_state=8,
        mamba_dt_rank=8,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    )
    model_of(config).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype="fp32", device="cpu")
    tied = [name for name, reason in left_alone(model).items() if "shares" in reason]
    assert any("shared_transf" in name for name in tied)
    trial_step(attach_adapters(model, method="dora", rank=3))


def test_encoders_are_refused():
    config = transformers.BertConfig(**ENCODER)
    with pytest.raises(UserError, match=r"model=bert: a later token changes earlier logits.*is_decoder"):
        choose_forward_mode(model_of(config))
    config.is_decoder = True
    choose_forward_mode(model_of(config))


def windowed_by_its_mask() -> nn.Module:
    return model_of(
        transformers.Qwen2MoeConfig(
            **GROUPED,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            use_sliding_window=True,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def test_a_window_that_the_mask_alone_carries_is_not_packed():
    model = windowed_by_its_mask()
    assert not choose_forward_mode(model).packed
    batch = pack(examples((40, 39), (30, 29)))
    expected = torch.cat([target_logits(model, pack([one]))[0] for one in examples((40, 39), (30, 29))])
    found = torch.cat([logits for logits, _ in logit_chunks(model, batch)])
    assert relative(found, expected) < 1e-4


def test_a_window_that_layers_pass_on_is_packed_and_comes_back():
    model = model_of(transformers.MistralConfig(**GROUPED, sliding_window=4096))
    with narrowed(model):
        assert model.config.sliding_window == 8
    assert choose_forward_mode(model).packed and model.config.sliding_window == 4096


def test_a_model_that_sees_padding_runs_one_example_at_a_time():
    config = transformers.ProphetNetConfig(
        hidden_size=64,
        vocab_size=320,
        num_decoder_layers=1,
        num_encoder_layers=1,
        num_decoder_attention_heads=4,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=96,
        encoder_ffn_dim=96,
        is_decoder=True,
    )
    model = model_of(config)
    assert choose_forward_mode(model) == ForwardMode(False, False, apart=True)
    both = examples((12, 11), (7, 6))
    alone = sum(loss_sum(model, pack([one])).item() for one in both)
    assert loss_sum(model, pack(both)).item() == pytest.approx(alone, rel=1e-5)


def falcon() -> nn.Module:
    return model_of(transformers.FalconConfig(**SMALL, new_decoder_architecture=False, parallel_attn=True, bias=False))


def test_a_model_may_write_into_what_a_dora_layer_returns():
    model = adapted(falcon())
    choose_forward_mode(model)
    copied = {name.rpartition(".")[2] for name, layer in named_adapters(model) if layer.copies_output}
    assert copied == {"dense_4h_to_h"}
    trial_step(model)


@pytest.mark.parametrize("name", ["llama", "lfm2", "qwen3_next", "bloom"])
def test_the_plan_expects_what_runs(name):
    real = choose_forward_mode(build(name))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(build(name).config)
    assert expected_forward_mode(empty) == real


def test_whatever_a_step_raises_is_one_line():
    model = attach_adapters(random_model("llama"))

    def breaks(module, inputs, output):
        if module.training:
            raise KeyError("lengths must be multiples\nof 64")

    model.model.layers[1].register_forward_hook(breaks)
    with pytest.raises(UserError) as error:
        trial_step(model)
    (line,) = error.value.problems
    assert line.startswith("model=llama: cannot be trained here") and "multiples" in line and "\n" not in line
    assert not model.training


def test_a_trial_leaves_nothing_behind_but_names():
    model = attach_adapters(random_model("llama"), method="dora", rank=3, dropout=0.5)
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output.detach() * 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    trial_step(model)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.dropout_p == 0.5 for _, layer in named_adapters(model))
    assert {re.sub(r".*\.", "", name) for name in info(model).unreached} == {"gate_proj", "up_proj", "down_proj"}
    assert "3 of 14 adapters get no gradient" in untouched(model)[-1]


def test_fused_experts_are_said():
    model = attach_adapters(build("mixtral"))
    (line,) = untouched(model)
    assert re.match(r"\d+% of the weights are no linear layers and stay dense without adapters: .*experts", line)
    assert untouched(attach_adapters(random_model("llama"))) == []


def test_a_gated_mlp_with_a_limit_is_not_replaced():
    config = transformers.AutoConfig.for_model("deepseek_v4", hidden_size=64, moe_intermediate_size=96)
    box = nn.Sequential(DeepseekV4MLP(config))
    for parameter in box.parameters():
        nn.init.normal_(parameter, std=0.5)
    for size in (1.0, 1e3, -1e3):
        x = size * torch.randn(50, 64)
        expected = box(x)
        assert torch.equal(fuse(box)(x), expected)


def test_a_new_head_is_not_adapted_in_silence():
    """An adapter file does not hold it: loaded over another draw it would be another model."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER))
    with pytest.raises(UserError, match="targets=all-linear: classifier belongs to a head outside the base model"):
        attach_adapters(model)
    names = {name for name, _ in named_adapters(attach_adapters(model, targets=["query", "value"]))}
    assert names and all(name.startswith("bert.") for name in names)
    attach_adapters(transformers.BertModel(transformers.BertConfig(**ENCODER)))


def test_memory_that_runs_out_in_the_trial_is_said():
    model = attach_adapters(build("llama"), method="lora", rank=3)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_submodule("model.layers.1").register_forward_hook(full)
    with pytest.raises(UserError, match="memory: it ran out in two short examples"):
        choose_forward_mode(model)
    model.get_submodule("model.layers.1")._forward_hooks.clear()
    choose_forward_mode(model)
    model.get_submodule("model.layers.1").register_forward_hook(full)
    with pytest.raises(UserError, match="memory: it ran out in a step on two short examples"):
        trial_step(model)
