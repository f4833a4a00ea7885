"""torch.compile of an adapted model runs and has the losses of eager, to the bit (backend aot_eager)."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted, random_model

from qlora import adapter_parameters, quantize_
from qlora.layers.fused import fuse

IDS = torch.arange(96).mul(7919).remainder(320).view(2, 48)


def losses(method: str, dtype: torch.dtype, compiled: bool) -> list[float]:
    """Four steps of AdamW on a tiny Llama in NF4 with fused modules, as `load_base` and `attach` leave a model."""
    model = adapted(fuse(quantize_(random_model("llama").to(dtype))), method).train()
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    found = []
    for _ in range(4):
        loss = forward(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


# Torch's own: dynamo makes an instance of every Function that it traces, and looks at the gradients of all tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.float32), ("dora", torch.bfloat16)], ids=str)
def test_compiled_is_eager(method, dtype):
    torch.compiler.reset()
    # More recompilations than this for one function would mean that something which changes every step is a constant.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        assert losses(method, dtype, compiled=True) == losses(method, dtype, compiled=False)
