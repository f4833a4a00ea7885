"""Which kernels a training step runs on this machine: `qlora doctor --trace`.

The step is that of `qlora finetune --bits 4 --method dora`, of a Llama of random weights that is made here in no time.
The alternative, a table of what should run where, would be a second statement of what `qlora_kernels.backends` decides,
and could be wrong. (QLORA_TRACE=1 tells the same of any command, with its own model.)
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora.data.batch import Example, pack
from qlora.layers.attach import adapter_parameters, attach
from qlora.layers.forward_mode import forward_mode
from qlora.layers.fused import fuse
from qlora.layers.linear import quantize_
from qlora.models.device import DTYPES, resolve_device, resolve_dtype
from qlora.optim.adamw import PagedAdamW
from qlora.specs import AdapterSpec
from qlora.train.step import optimizer_step
from qlora_kernels import backends


def trace() -> dict[str, dict[str, int]]:
    """Operator -> backend -> calls, of one training step on the device that `auto` means."""
    device = resolve_device("auto")
    dtype = DTYPES[resolve_dtype("auto", device)]
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        attach(quantize_(model), AdapterSpec(method="dora"))
    if backends.has_fused_elementwise(device):
        fuse(model, join=backends.has_joined_products(device))
    forward_mode(model)
    lengths = (70, 33)
    batch = pack([Example(tuple(range(n)), (False,) + (True,) * (n - 1)) for n in lengths])
    optimizer = PagedAdamW(adapter_parameters(model))
    before = backends.ROUTES.copy()
    optimizer_step(model, optimizer, [batch], rate=1e-4, clip=1.0)
    optimizer.close()
    return backends.routes(since=before)
