"""Llamas of random weights at the shapes of real models, made on the device a layer at a time: no dense model ever lives.

`build` gives a model in memory, ours or with bitsandbytes' layers over the same bytes (for PEFT); `write_checkpoint` a 4-bit folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "small": (128, 320, 2, 4, 2, 512),
}
RANK, ALPHA = 16, 32.0


def skeleton(shape: str) -> nn.Module:
    """A Llama whose parameters are on the meta device; its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, intermediate, layers, heads, groups, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=4096, use_cache=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def tensors(model: nn.Module, device: torch.device):
    """(name, tensor or NF4Weight, whether it is a linear layer's) of random weights on `device`, one at a time, the same ones every time."""
    from qlora import nf4

    generator = torch.Generator(device).manual_seed(0)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16, device=device), False
            continue
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        yield name, nf4.quantize(values) if name in linear else values, name in linear


def ours(weight, device: torch.device) -> nn.Module:
    from qlora.linear import NF4Linear

    with torch.device("meta"):
        layer = NF4Linear(weight.shape[1], weight.shape[0])
    layer.nf4 = weight
    return layer


def theirs(weight, device: torch.device) -> nn.Module:
    """bitsandbytes' layer over the same bytes."""
    import bitsandbytes

    from qlora import nf4

    layer = bitsandbytes.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    parts = {key.removeprefix("."): value for key, value in nf4.to_bitsandbytes(weight, torch.bfloat16).items() if key}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight.packed, parts, device=device, module=layer)
    layer.quant_state = layer.weight.quant_state
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # it would repack the weight at the first evaluation, and compute something else
    return layer


def build(shape: str, device: torch.device, layer: Callable = ours) -> nn.Module:
    model = skeleton(shape)
    for name, tensor, linear in tensors(model, device):
        path, _, part = name.rpartition(".")
        if linear:
            model.set_submodule(path, layer(tensor, device))
        else:
            setattr(model.get_submodule(path), part, nn.Parameter(tensor, requires_grad=False))
    return model.to(device).requires_grad_(False)


def with_peft(model: nn.Module, method: str) -> nn.Module:
    import peft

    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def attached(model: nn.Module, method: str) -> nn.Module:
    import qlora

    torch.manual_seed(0)
    return qlora.attach_adapters(model, method=method, rank=RANK, alpha=ALPHA)


def detached(model: nn.Module) -> nn.Module:
    """The base again."""
    from qlora.adapters import named_adapters

    for name, adapter in list(named_adapters(model)):
        model.set_submodule(name, adapter.base)
    return model


def random_batch(length: int, vocabulary: int, count: int = 1, seed: int = 0):
    from qlora.data import Example, collate

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (count, length), generator=generator).tolist()
    return collate([Example(tuple(row), (False,) + (True,) * (length - 1)) for row in ids])


def checkpointing(model: nn.Module, on: bool) -> None:
    from qlora.train import checkpoint_activations

    if on:
        checkpoint_activations(model)
    else:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def write_checkpoint(shape: str, folder: Path, device: torch.device) -> None:
    """A 4-bit checkpoint of random weights with a tokenizer of bytes, as `qlora quantize` would leave it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

    from qlora import nf4
    from qlora.merging import ShardWriter

    model = skeleton(shape)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 10**9)
    for name, tensor, linear in tensors(model, device):
        for suffix, part in (nf4.to_bitsandbytes(tensor, torch.bfloat16) if linear else {"": tensor}).items():
            writer.add(name + suffix, part.cpu())
    writer.close()
    config = model.config
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()  # fmt: skip
    config.save_pretrained(folder)
    letters = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | letters, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(folder)
