"""NF4 against its derivation, against bitsandbytes bit for bit, and its corner cases."""

from __future__ import annotations

import re

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora import UserError
from qlora.layers import nf4
from qlora.layers.linear import linear_names
from qlora.specs import SCALES
from qlora_kernels import reference
from qlora_kernels.weight import levels_of

CPU = torch.device("cpu")


def weights(smollm2_dense):
    layer = smollm2_dense.model.layers[3]
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(96, 320, generator=generator)
    return {
        "smollm2 down_proj": layer.mlp.down_proj.weight,
        "smollm2 k_proj": layer.self_attn.k_proj.weight,
        "gaussian": gaussian,
        "student-t": gaussian / torch.randn(96, 320, generator=generator).abs().clamp(min=1e-3),
        "constant": torch.full((64, 128), -0.37),
        "sparse": gaussian * (torch.rand(96, 320, generator=generator) < 0.02),
    }


def from_bitsandbytes(packed, state):
    parts = {"." + key: value for key, value in state.as_dict(packed=True).items()}
    return nf4.from_bitsandbytes({"": packed, **parts})


def test_levels_are_derived():
    """The recipe of QLoRA's appendix E in float32 gives the 16 levels bit for bit."""
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].numpy()).tolist()
    negative = (-norm.ppf(torch.linspace(offset, 0.5, 8)[:-1].numpy())).tolist()
    levels = torch.tensor(sorted([*positive, 0.0, *negative]))
    assert torch.equal(levels / levels.max(), levels_of("nf4", CPU))


def test_maps_equal_bitsandbytes():
    assert torch.equal(levels_of("nf4", CPU), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(reference.dynamic_map(CPU), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_scales_and_values_equal_bitsandbytes(smollm2_dense, dtype):
    """Codes and absmax come out the same; from the same bytes every dtype decodes to the same bits."""
    for name, weight in weights(smollm2_dense).items():
        weight = weight.detach().to(dtype)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
        ours = nf4.quantize(weight, double_quant=False)
        assert torch.equal(ours.packed, packed), name
        assert torch.equal(ours.absmax, state.absmax), name
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        ours = nf4.quantize(weight)
        assert torch.equal(ours.packed, packed), name
        assert torch.equal(ours.nested_absmax, state.state2.absmax) and torch.equal(ours.nested_offset, state.offset), (
            name
        )
        # bitsandbytes looks the 8-bit codes up in a table on a CPU; ours follow the exact midpoints
        assert (ours.absmax != state.absmax).float().mean() < 0.02 or name == "constant", name
        theirs = from_bitsandbytes(packed, state)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            state.dtype = out
            expected = bnb.dequantize_4bit(packed, state)
            if out == torch.bfloat16:  # it flushes bf16 subnormals
                expected = torch.where(
                    nf4.dequantize(theirs, out).abs() < 2.0**-126, nf4.dequantize(theirs, out), expected
                )
            assert torch.equal(nf4.dequantize(theirs, out), expected), (name, out)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (33, 130), (129, 63)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
def test_decoding_is_the_definition(shape, blocksize, double_quant):
    """Brute force, element by element: nearest level times the decoded block scale."""
    weight = torch.randn(shape)
    weight.view(-1)[: min(70, weight.numel() - 1)] = 0  # a block of zeros where it fits
    quantized = nf4.quantize(weight, blocksize, double_quant)
    scales = reference.decode_absmax(quantized)
    levels = levels_of("nf4", CPU)
    flat = weight.view(-1)
    expected = torch.empty_like(flat)
    for i, value in enumerate(flat):
        block = flat[i // blocksize * blocksize :][:blocksize]
        x = value * (1 / block.abs().max().clamp(min=1e-38))
        expected[i] = levels[(levels - x).abs().argmin()] * scales[i // blocksize]
    assert torch.equal(nf4.dequantize(quantized).view(-1), expected)
    if weight.numel() % 2:
        assert quantized.packed[-1, 0] & 15 == 7


def test_storage():
    weight = nf4.quantize(torch.randn(1024, 1024))
    assert (weight.nbytes - 4) / weight.packed.numel() / 2 == pytest.approx(
        0.515869, abs=1e-6
    )  # - the offset, 4 bytes a matrix


@pytest.mark.parametrize("columns", [64, 66])
def test_row_gain(columns):
    weight = nf4.quantize(torch.randn(48, columns))
    gain = torch.randn(48)
    assert torch.allclose(nf4.dequantize(weight, row_scale=gain), gain[:, None] * nf4.dequantize(weight), rtol=1e-6)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("columns", [576, 64, 37])
def test_rows(columns, double_quant):
    weight = nf4.quantize(torch.randn(600, columns), double_quant=double_quant)
    dense, step = nf4.dequantize(weight), nf4.row_chunk(weight, 1)
    for start in range(0, 600, step):
        stop = min(start + step, 600)
        assert torch.equal(nf4.dequantize(nf4.rows(weight, start, stop)), dense[start:stop])


@pytest.mark.parametrize("double_quant", [True, False])
def test_mse_scales_leave_less_error(smollm2_dense, double_quant):
    """At least 10 % less than absmax in the stored weight, over every layer of SmolLM2; the codes are the nearest under
    what is stored.
    """
    errors = dict.fromkeys(SCALES, 0.0)
    for name in linear_names(smollm2_dense):
        weight = smollm2_dense.get_submodule(name).weight.detach()
        for scales in SCALES:
            stored = nf4.quantize(weight, double_quant=double_quant, scales=scales)
            errors[scales] += (nf4.dequantize(stored).double() - weight).square().sum().item()
    print(f"squared error, double_quant {double_quant}: {errors}, {errors['mse'] / errors['absmax'] - 1:.1%}")
    assert errors["mse"] < 0.9 * errors["absmax"]
    decoded = reference.decode_absmax(stored)
    grid = decoded.repeat_interleave(64)[:, None] * levels_of("nf4", CPU)
    nearest = (grid - weight.reshape(-1, 1)).abs().amin(1)
    assert torch.allclose((nf4.dequantize(stored) - weight).abs().view(-1), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_layout_both_ways(double_quant, scales):
    """bitsandbytes reads our tensors to the same values; what we read back is what we wrote."""
    weight = nf4.quantize(torch.randn(96, 128), double_quant=double_quant, scales=scales)
    parts = nf4.to_bitsandbytes(weight, torch.bfloat16)
    state = bnb.QuantState.from_dict({"weight" + k: v for k, v in parts.items() if k}, device=CPU)
    assert torch.equal(bnb.dequantize_4bit(parts[""], state), nf4.dequantize(weight, torch.bfloat16))
    again = nf4.from_bitsandbytes(parts)
    assert torch.equal(nf4.dequantize(again), nf4.dequantize(weight)) and again.shape == weight.shape


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad, scales):
    weight = torch.randn(64, 64)
    weight[3, 9] = bad
    with pytest.raises(UserError, match=re.escape("model.layers.0.q_proj.weight")):
        nf4.quantize(weight, name="model.layers.0.q_proj.weight", scales=scales)


def test_all_problems_at_once():
    with pytest.raises(UserError) as error:
        nf4.quantize(torch.ones(4, dtype=torch.int32), blocksize=48, scales="max")
    assert len(error.value.problems) == 4


def test_only_nf4_loads():
    packed, state = bnb.quantize_4bit(torch.randn(64, 64), blocksize=64, quant_type="fp4", compress_statistics=True)
    parts = {"." + k: v for k, v in state.as_dict(packed=True).items()}
    with pytest.raises(UserError, match="needs the tensors"):
        nf4.from_bitsandbytes({"": packed, **parts})
