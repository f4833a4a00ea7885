"""What holds for every operator: torch's own checks, a reference that says what it means, a shape function, backends
with the same arguments, and a count of what is written in place.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import NF4, quantized, routed

from qlora_kernels import backends, ops, reference
from qlora_kernels.bitsandbytes import nf4 as bitsandbytes_nf4
from qlora_kernels.cpu.native import Native
from qlora_kernels.weight import NESTED_BLOCKSIZE

pytestmark = pytest.mark.usefixtures("poisoned", "threads")

each_operator = pytest.mark.parametrize("name", ops.OPERATORS)


def nf4_arguments() -> dict[str, tuple]:
    dense = torch.randn(10, 128)
    weight, row_scale, absmax = quantized(dense), torch.rand(10), torch.rand(20)
    parts, layout = weight.parts, weight.layout
    return {
        "quantize_4bit": (dense.bfloat16(), NF4, 64),
        "fit_scales_4bit": (dense, NF4, 64),
        "encode_4bit": (dense, NF4, absmax, 64),
        "quantize_absmax": (absmax, NESTED_BLOCKSIZE),
        "dequantize_4bit": (parts, layout, row_scale, torch.bfloat16),
        "dequantize_4bit_into": (torch.zeros(10, 128, dtype=torch.float16), parts, layout, None),
        "dequantize_4bit_joined": ([*parts, *parts], [*layout, *layout], torch.rand(20), torch.bfloat16),
        "gemv_4bit": (dense[0].bfloat16(), parts, layout),
        "matmul_4bit": (torch.randn(32, 128).bfloat16(), parts, layout, row_scale, True),
    }


def adapter_arguments() -> dict[str, tuple]:
    dense = torch.randn(10, 128)
    weight, row_scale, A, B = quantized(dense), torch.rand(10), torch.randn(4, 128), torch.randn(10, 4)
    parts, layout = weight.parts, weight.layout
    dy, y, x, xA = (torch.randn(32, n).bfloat16() for n in (10, 10, 128, 4))
    sums = (dense.bfloat16(), A.t().contiguous().bfloat16(), B.bfloat16(), dense.bfloat16(), None, torch.ones(128), 2.0)
    joined = torch.rand(2, 10), [4, 6], 2.0
    saved = [x, xA, A.bfloat16(), B.bfloat16(), torch.rand(3, 10)]
    return {
        "row_norms_4bit": (parts, layout, A, B, 2.0),
        "row_norms_4bit_all": ([*parts, *parts], [*layout, *layout], [A, A], [B, B], [2.0, 1.0]),
        "adapted_linear": (x, x.flip(0), A, B, row_scale, None, row_scale, 2.0, parts, layout),
        "adapted_linear_backward": (dy, saved, y, 2.0, parts, layout, True),
        "prepare_lora_factors": (A, B, row_scale, row_scale, 2.0, torch.bfloat16),
        "adapted_operands": (
            *([A, A], [B, B], [row_scale] * 2, [row_scale] * 2, 2.0),
            *([*parts, *parts], [*layout, *layout], torch.bfloat16),
        ),
        "joined_gradients": (dy, *(torch.randn(n, 4).bfloat16() for n in (10, 32)), y, None, *joined),
        "columnwise_dot": (dense.bfloat16(), dense.bfloat16()),
        "matmul_tn": (B.bfloat16(), dense.bfloat16()),
        "matmul_dense_into": (torch.zeros(32, 10), torch.randn(32, 128), dense, True),
        "adapter_gradients": sums,
    }


def step_arguments() -> dict[str, tuple]:
    x, inverse = torch.randn(10, 128), torch.rand(10)
    heads, low = x.view(10, 2, 64).bfloat16(), x.bfloat16()
    cos, sin = heads[:5, 0], heads[5:, 0]
    return {
        "cross_entropy_": (x.clone(), torch.arange(10)),
        "geglu": (x, x),
        "geglu_backward": (x, x, x.flip(0)),
        "rms_norm": (low, torch.ones(128).bfloat16(), 1e-6),
        "add_rms_norm": (low, low.flip(0), torch.ones(128).bfloat16(), 1e-6),
        "rms_norm_backward": (x, x, torch.ones(128), inverse),
        "rms_norm_backward_add": (x, x, torch.ones(128), inverse, x.flip(0)),
        "swiglu": (x, x),
        "swiglu_backward": (x, x, x.flip(0)),
        "swiglu_backward_dots": (low, low, low.flip(0)),
        "swiglu_joined": (low,),
        "swiglu_joined_backward": (low[:, :64].contiguous(), low, True),
        "rotate": (heads, heads[:, :1], cos, sin),
        "rotate_backward": (heads, heads[:, :1], cos, sin),
        "attention": (heads, heads[:, :1], heads[:, 1:], [0, 3, 10], 0.125),
        "attention_backward": (
            *(heads, heads, heads[:, :1], heads[:, 1:], heads),
            *(torch.ones(2, 10), [0, 3, 10], 0.125),
        ),
    }


def optim_arguments() -> dict[str, tuple]:
    codes, maxima, work = torch.zeros(512, dtype=torch.uint8), torch.ones(2), torch.zeros(512, dtype=torch.int32)
    p, g, moments = list(torch.rand(2, 30)), list(torch.rand(2, 30)), torch.rand(2, 60)
    numbers = [0.9, 0.999, 1e-8, 0.99, 1e-3, 0.5, 0.1]
    return {
        "adamw_": (p, g, [0, 30], *moments, torch.rand(3, 60), numbers),
        "total_norm": ([torch.randn(10, 128), torch.randn(4), torch.randn(7)],),
        "encode_blocks_into": (codes.clone(), maxima.clone(), torch.randn(512), work.clone(), NESTED_BLOCKSIZE, True),
        "decode_blocks_into": (torch.empty(512), codes, maxima, work.clone(), NESTED_BLOCKSIZE, False),
    }


def arguments_of(name: str) -> tuple:
    return (nf4_arguments() | adapter_arguments() | step_arguments() | optim_arguments())[name]


@each_operator
def test_operators_pass_opcheck(name):
    """Schema, shape function and dispatch, as torch checks them, with whatever runs on this machine."""
    torch.library.opcheck(getattr(ops, name), arguments_of(name))


@each_operator
def test_every_operator_has_a_reference_that_says_what_it_means(name):
    function = getattr(reference, name)
    assert function.__module__.startswith("qlora_kernels.reference.")
    assert function.__doc__
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qlora::{name}", "CompositeExplicitAutograd")


@each_operator
def test_every_operator_has_a_shape_function(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qlora::{name}", "Meta")


@each_operator
@pytest.mark.parametrize("backend", [reference, Native, bitsandbytes_nf4], ids=["reference", "native", "bitsandbytes"])
def test_a_backend_takes_the_arguments_of_the_operator(name, backend):
    """By the names of the schema, in its order; what a backend has beyond them has defaults."""
    if not hasattr(backend, name):
        return
    found = [p for p in inspect.signature(getattr(backend, name)).parameters.values() if p.name != "self"]
    schema = [argument.name for argument in getattr(ops, name)._schema.arguments]
    assert [parameter.name for parameter in found[: len(schema)]] == schema
    assert all(parameter.default is not parameter.empty for parameter in found[len(schema) :])


def test_the_list_of_operators_is_that_of_the_library():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qlora::")}
    assert registered == set(ops.OPERATORS) and len(ops.OPERATORS) == len(registered)
    assert all(getattr(torch.ops.qlora, name).default is getattr(ops, name) for name in ops.OPERATORS)


# ---------------------------------------------------------------- what is written in place


def mutated(name: str) -> list[int]:
    """Which arguments the schema says are written."""
    arguments = getattr(ops, name)._schema.arguments
    return [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


# `work` of the optimizer's operators and what is used up with it is nobody's to save.
COUNTED = {name: [0] for name in ("dequantize_4bit_into", "cross_entropy_", "adamw_", "matmul_dense_into")}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("code", ["operators", "native", "reference"])
def test_writing_into_a_tensor_counts_as_a_change(kernels, name, code):
    """Autograd must notice when a tensor it has saved is overwritten, on every path."""
    write = getattr({"operators": ops, "native": routed(kernels), "reference": reference}[code], name)
    arguments = arguments_of(name)
    written = [t for i in COUNTED[name] for t in (arguments[i] if isinstance(arguments[i], list) else [arguments[i]])]
    before = [tensor._version for tensor in written]
    write(*arguments)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))


def test_every_operator_that_writes_is_known():
    writing = {name for name in ops.OPERATORS if mutated(name)}
    assert writing == {*COUNTED, "encode_blocks_into", "decode_blocks_into"}
    assert all(set(COUNTED[name]) <= set(mutated(name)) for name in COUNTED)


def test_a_tensor_of_inference_mode_may_be_written(kernels):
    """It has no version to count."""
    with torch.inference_mode():
        weight = quantized(torch.randn(4, 64))
        for write in (ops.dequantize_4bit_into, kernels.dequantize_4bit_into, reference.dequantize_4bit_into):
            out = torch.empty(4, 64)
            write(out, weight.parts, weight.layout, None)
            assert out.isfinite().all()


# ---------------------------------------------------------------- another implementation


def test_a_function_can_take_the_place_of_an_operator(monkeypatch):
    """And what it does not take is the reference's."""
    monkeypatch.setattr(backends, "ROUTES", type(backends.ROUTES)())
    double = backends.routed("swiglu", lambda gate, up: NotImplemented if len(gate) > 1 else 2 * gate * up, "mine")
    assert torch.equal(double(torch.ones(1), torch.ones(1)), torch.full((1,), 2.0))
    gate, up = torch.randn(2, 5)
    assert torch.equal(double(gate, up), reference.swiglu(gate, up))
    assert backends.ROUTES == {("swiglu", "mine"): 1, ("swiglu", "reference"): 1}
