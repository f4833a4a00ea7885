"""GPTQ's codes under fixed scales: those of the definition, better than the nearest, and a file bitsandbytes reads."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import tiny
import torch

from qlora.calibrate.codes import choose_codes_of, choose_layer
from qlora.calibrate.error_start import weighted_error
from qlora.calibrate.gptq import choose_codes, gptq
from qlora.layers import nf4
from qlora.layers.linear import NF4Linear, linear_names, quantize_


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


def test_parts_of_h_are_as_good_as_h_without_what_lies_between_them():
    W, H = problem()
    nearest = nf4.quantize(W)
    parts = torch.stack([H[:64, :64], H[64:128, 64:128], H[128:, 128:]])
    chosen = gptq(nearest, W, parts, damping=0.0)
    columns = [gptq(nf4.quantize(W, double_quant=False), W, torch.block_diag(*parts), damping=0.0)]
    exact = [gptq(nf4.quantize(W, double_quant=False), W, parts, damping=0.0)]
    same = nf4.dequantize(columns[0]) == nf4.dequantize(exact[0])
    assert same.float().mean() > 0.99  # columns of parts are taken in another order, no part feeds another
    whole, cut, none = (
        weighted_error(W - nf4.dequantize(weight), H) for weight in (gptq(nearest, W, H), chosen, nearest)
    )
    assert whole < cut < none
    assert gptq(nearest, W, torch.stack([H[:96, :96], H[96:, 96:]])) is nearest  # blocks across parts


def quantized_llama(seed=1):
    """(A model in NF4, its 16-bit weights by layer.)"""
    model = tiny.llama(seed).eval()
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in linear_names(model)}
    return quantize_(model), dense


class Kept:
    """Weights that are in memory, as `models.originals.Originals` gives them."""

    def __init__(self, dense):
        self.dense, self.there = dense, frozenset(dense)

    def weight(self, name, device):
        return self.dense[name]


def test_no_layer_errs_more_than_with_the_nearest_codes():
    """On the text that chose them; where an error would not fall the codes stay, bit by bit."""
    model, dense = quantized_llama()
    exact = model.get_submodule("model.layers.0.mlp.up_proj").frozen.dense(torch.float32)
    dense["model.layers.0.mlp.up_proj"] = exact  # NF4 holds it as it is
    before = {name: m.quantized.packed.clone() for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    batches = [torch.arange(2, 98).view(4, 24)]
    found = choose_codes_of(model, Kept(dense), batches)
    assert found.keys() == before.keys()
    assert found["model.layers.0.mlp.up_proj"].after == found["model.layers.0.mlp.up_proj"].before == 0
    moved = {n for n, codes in before.items() if not torch.equal(codes, model.get_submodule(n).quantized.packed)}
    assert moved == {name for name, layer in found.items() if layer.after < layer.before}
    assert len(moved) == len(before) - 1 and all(layer.after <= layer.before for layer in found.values())


def test_codes_that_err_more_are_not_taken():
    """A layer with codes that fit H more closely than the usual damping lets them."""
    W, H = problem()
    layer = NF4Linear(192, 24)
    layer.quantized = better = gptq(nf4.quantize(W), W, H, damping=1e-4)
    usual = gptq(nf4.quantize(W), W, H)
    errors = [weighted_error(W - nf4.dequantize(weight), H) for weight in (better, usual)]
    assert errors[0] < errors[1]
    found = choose_layer(layer, W, H.unsqueeze(0))
    assert found.after == found.before and torch.equal(layer.quantized.packed, better.packed)
    assert found.before == pytest.approx(errors[0] / weighted_error(W, H), rel=1e-4)
