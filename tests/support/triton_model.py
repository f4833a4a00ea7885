"""A whole model's steps by the Triton kernels, in Triton's interpreter: a check of triton_interpret.py."""

from __future__ import annotations

import torch

from qlora_kernels.triton import adapter, nf4, optim, step

NEEDED = (  # by two DoRA steps of an NF4 model
    "dequantize_4bit_into",
    "row_norms_4bit_all",
    "prepare_lora_factors",
    "adapter_gradients",
    "dequantize_4bit_joined",
    "adapted_operands",
    "joined_gradients",
    "swiglu_joined",
    "swiglu_joined_backward",
    "rotate",
    "rotate_backward",
    "rms_norm",
    "cross_entropy_",
    "adamw_",
)


def check_model() -> None:
    """Two DoRA steps of a whole NF4 model, its optimizer's included: all operators from these kernels, as on a card, or
    from the reference.
    """
    from qlora_kernels import backends, ops, reference

    backends.AVOIDED["matmul_4bit", "native"] = "a card, which this CPU stands for, decodes a weight before its product"
    backends.AVOIDED["add_rms_norm", "native"] = "torch adds on a card"
    modules = (nf4, adapter, step, optim)
    kernels = {name: getattr(m, name) for m in modules for name in ops.OPERATORS if hasattr(m, name)}
    ends = []
    for mine in (False, True):
        library = torch.library.Library("qlora", "IMPL")
        for name in ops.OPERATORS:
            function, backend = getattr(reference, name), "reference"
            if mine and name in kernels:
                function, backend = kernels[name], "triton"
            backends.install(name, "CPU", backends.routed(name, function, backend), library)
        backends.ROUTES.clear()
        ends.append(two_steps())
    assert not (missing := [name for name in NEEDED if not backends.ROUTES[name, "triton"]]), missing
    (expected, moved), (found, also) = ends
    assert ((found - expected).abs().max() <= 2e-6 * expected.abs().max()).item(), (found, expected)
    # As a whole: AdamW divides a gradient near nothing by itself, so a single element may move anyhow.
    assert ((also - moved).norm() <= 2e-4 * moved.norm()).item(), (also - moved).norm() / moved.norm()


def two_steps() -> tuple[torch.Tensor, torch.Tensor]:
    """(losses and norms of the gradients [2, 2], how far all parameters moved, flat)."""
    from tiny import adapted, random_model

    import qlora
    from qlora.data.batch import Example, pack
    from qlora.layers.attach import refresh_row_norms
    from qlora.layers.fused import fuse
    from qlora.layers.linear import quantize_
    from qlora.train.step import optimizer_step

    model = quantize_(random_model("llama").requires_grad_(False))
    model = fuse(adapted(model, "dora"), join=True).train()
    parameters = qlora.adapter_parameters(model)
    start = [p.detach().clone() for p in parameters]
    optimizer = qlora.PagedAdamW(parameters, lr=1e-2)
    batches = [pack([Example(tuple(range(i, i + 70)), (False,) + (True,) * 69)]) for i in range(4)]
    metrics = []
    for i in range(2):
        refresh_row_norms(model)  # as before each forward pass on a GPU
        metrics.append(optimizer_step(model, optimizer, batches[2 * i : 2 * i + 2], 1e-2, 1.0))
    figures = torch.tensor([list(found.values()) for found in metrics])
    return figures, torch.cat([(p.detach() - was).flatten() for p, was in zip(parameters, start, strict=True)])
