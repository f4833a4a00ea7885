"""Llamas of random NF4 weights at the shapes of real models: for speed and memory at sizes whose checkpoints nobody
wants to download.

Codes and scales are drawn where they will lie, so no dense weight ever exists; the scales are about those of a normal
initialization with a standard deviation of 0.02. `build` gives a model in memory, ours or with bitsandbytes' layers
over the same bytes (for PEFT), `write_checkpoint` a 4-bit folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "small": (128, 320, 2, 4, 2, 512, False),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
}
RANK, ALPHA = 16, 32.0


def llama_config(shape: str):
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, groups, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def skeleton(shape: str) -> nn.Module:
    """A Llama on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(llama_config(shape), dtype=torch.bfloat16)


def random_nf4(out: int, columns: int, generator: torch.Generator):
    from qlora_kernels.weight import NESTED_BLOCKSIZE, QuantizedWeight

    device, blocks = generator.device, out * columns // 64
    packed = torch.empty(out * columns // 2, 1, dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
    absmax = torch.empty(blocks, dtype=torch.uint8, device=device).random_(64, 192, generator=generator)
    nested = torch.full((-(-blocks // NESTED_BLOCKSIZE),), 0.02, device=device)
    scales = absmax, nested, torch.tensor(0.05, device=device)
    return QuantizedWeight.of(packed, scales, (out, columns), 64)


def weights(model: nn.Module, device: torch.device) -> Iterator[tuple[str, object]]:
    """(name, QuantizedWeight of a linear layer or bf16 tensor) of random weights on `device`, one at a time, the same
    ones every time.
    """
    from qlora.layers.linear import linear_names

    generator = torch.Generator(device).manual_seed(0)
    linear = {f"{name}.weight" for name in linear_names(model)}
    for name, parameter in list(model.named_parameters()):
        if name in linear:
            yield name, random_nf4(*parameter.shape, generator)
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            yield name, values.fill_(1) if values.dim() == 1 else values.normal_(0, 0.02, generator=generator)


def ours(weight, device: torch.device) -> nn.Module:
    from qlora.layers.linear import NF4Linear

    with torch.device("meta"):
        layer = NF4Linear(weight.shape[1], weight.shape[0])
    layer.quantized = weight
    return layer


def theirs(weight, device: torch.device) -> nn.Module:
    """bitsandbytes' layer over the same bytes."""
    import bitsandbytes

    from qlora.layers import nf4

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    parts = {key.removeprefix("."): value for key, value in nf4.to_bitsandbytes(weight, torch.bfloat16).items() if key}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight.packed, parts, device=device, module=layer)
    layer.quant_state = layer.weight.quant_state
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = (
            False  # it would repack the weight at the first evaluation, and compute something else
        )
    return layer


def build(shape: str, device: torch.device | str = "cpu", layer: Callable = ours) -> nn.Module:
    """A frozen model; ours as `qlora.load_base` returns it."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from qlora.layers.fused import fuse
    from qlora_kernels import backends

    device = torch.device(device)
    model = skeleton(shape)
    for name, value in weights(model, device):
        path, _, part = name.rpartition(".")
        if isinstance(value, Tensor):
            setattr(model.get_submodule(path), part, nn.Parameter(value, requires_grad=False))
        else:
            model.set_submodule(path, layer(value, device))
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)  # its frequencies are computed, not loaded
    if layer is ours and backends.has_fused_elementwise(device):
        fuse(model, join=backends.has_joined_products(device))
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def with_peft(model: nn.Module, method: str) -> nn.Module:
    import peft

    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def attached(model: nn.Module, method: str) -> nn.Module:
    import qlora

    torch.manual_seed(0)
    return qlora.attach_adapters(model, method=method, rank=RANK, alpha=ALPHA)


def random_batch(length: int, vocabulary: int, count: int = 1, seed: int = 0, lowest: int = 2):
    """`count` examples of random tokens, all but the first of each targets."""
    return random_examples([length] * count, vocabulary, seed, lowest)


def random_examples(lengths: list[int], vocabulary: int, seed: int = 0, lowest: int = 2):
    """Examples of these lengths, likewise."""
    from qlora.data.batch import Example, pack

    ids = torch.randint(lowest, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return pack([Example(tuple(row.tolist()), (False,) + (True,) * (len(row) - 1)) for row in ids.split(lengths)])


def checkpointing(model: nn.Module, on: bool) -> None:
    from qlora.train.step import checkpoint_activations

    if on:
        checkpoint_activations(model)
    else:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def write_checkpoint(shape: str, folder: Path, device: torch.device) -> None:
    """A 4-bit checkpoint of random weights with a tokenizer of bytes, as `qlora quantize` would leave it."""
    from transformers import BitsAndBytesConfig

    from qlora.export.shards import ShardWriter
    from qlora.layers import nf4

    model = skeleton(shape)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 10**9)
    for name, value in weights(model, device):
        for suffix, part in (
            {"": value} if isinstance(value, Tensor) else nf4.to_bitsandbytes(value, torch.bfloat16)
        ).items():
            writer.add(name + suffix, part.cpu())
    writer.close()
    config = model.config
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer():
    """A token for each byte of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | letters, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
