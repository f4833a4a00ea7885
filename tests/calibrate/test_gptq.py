"""GPTQ's codes under fixed scales: those of the definition, better than the nearest, and a file bitsandbytes reads."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora.calibrate.error_start import weighted_error
from qlora.calibrate.gptq import choose_codes, gptq
from qlora.layers import nf4


def problem(out=24, columns=192, seed=0):
    """(W, H); inputs of different size that depend on each other."""
    torch.manual_seed(seed)
    X = torch.randn(600, columns) @ torch.randn(columns, columns) * torch.logspace(-1, 1, columns)
    return torch.randn(out, columns), X.t() @ X / len(X)


def by_definition(W, scales, H, levels, blocksize, damping):
    """Column by column in float64, the inverse of what is left of H taken anew each time (OBQ, arXiv:2208.11580)."""
    W, H = W.double().clone(), H.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    left = H.diagonal().argsort(descending=True).tolist()
    codes = torch.empty(W.shape, dtype=torch.uint8)
    while left:
        j, rest = left[0], left[1:]
        scale = scales[:, j // blocksize].double()
        codes[:, j] = (W[:, j : j + 1] / scale.unsqueeze(1) - levels.double()).abs().argmin(1)
        error = W[:, j] - levels.double()[codes[:, j].long()] * scale
        inverse = torch.linalg.inv(H[left][:, left])
        W[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0, 1:])
        left = rest
    return codes


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_codes_are_those_of_the_definition(damping):
    W, H = problem()
    weight = nf4.quantize(W, double_quant=False)
    arguments = W, weight.absmax.view(24, -1), H, weight.levels, 64, damping
    same = choose_codes(*arguments) == by_definition(*arguments)
    assert same.float().mean() > 0.999  # a tie that float32 breaks otherwise


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_error_falls_and_the_scales_stay(double_quant):
    W, H = problem()
    nearest = nf4.quantize(W, double_quant=double_quant)
    chosen = gptq(nearest, W, H)
    errors = [weighted_error(W - nf4.dequantize(weight), H) for weight in (nearest, chosen)]
    assert errors[1] < 0.6 * errors[0]
    assert all(one is two for one, two in zip(nearest.parts[1:], chosen.parts[1:], strict=True))


def test_bitsandbytes_reads_the_same_values():
    W, H = problem()
    chosen = gptq(nf4.quantize(W), W, H)
    parts = nf4.to_bitsandbytes(chosen, torch.float32)
    state = bnb.QuantState.from_dict({"weight" + k: v for k, v in parts.items() if k}, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(parts[""], state), nf4.dequantize(chosen))


def test_blocks_that_cross_rows_keep_their_codes():
    W, H = problem(columns=100)
    nearest = nf4.quantize(W)
    assert gptq(nearest, W, H) is nearest


def test_dead_inputs_and_zero_blocks():
    W, H = problem()
    H[5], H[:, 5], W[3, :64] = 0, 0, 0
    nearest = nf4.quantize(W)
    values = nf4.dequantize(gptq(nearest, W, H, damping=0.0))
    assert torch.isfinite(values).all()
    assert torch.allclose(values[:, 5], nf4.dequantize(nearest)[:, 5])  # no feedback reaches or leaves it
