"""The closed form of an adapter that undoes a quantization error: the best there is, and never worse than none."""

from __future__ import annotations

import pytest
import tiny
import torch

from qlora.calibrate.error_start import error_factors, principal_directions, row_forms, weighted_error
from qlora.calibrate.start import start_layer
from qlora.layers.attach import attach_adapters, named_adapters
from qlora.layers.linear import quantize_


def drawn(out: int = 48, columns: int = 64, rank: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(E, H, A) in float64; the inputs differ a hundred times in size, and depend on each other."""
    torch.manual_seed(seed)
    X = torch.randn(400, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    X *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    E = torch.randn(out, columns, dtype=torch.float64) / 100
    return E, X.t() @ X / len(X), torch.randn(rank, columns, dtype=torch.float64)


def factors(E, H, A, scaling=1.0, rounds=5):
    return error_factors(E, E @ H, H.diagonal().mean().item(), A, scaling, rounds)


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_it_is_the_solution_by_the_root_of_h(scaling):
    """QERA's form: the best approximation of E H^(1/2), times H^(-1/2)."""
    E, H, A = drawn()
    values, vectors = torch.linalg.eigh(H)
    root, inverse = vectors * values.sqrt() @ vectors.t(), vectors / values.sqrt() @ vectors.t()
    U, S, Vt = torch.linalg.svd(E @ root)
    published = (U[:, :5] * S[:5]) @ Vt[:5] @ inverse
    A_new, B = factors(E, H, A, scaling, rounds=400)
    assert (scaling * B @ A_new - published).norm() < 1e-8 * published.norm()


def test_its_rounds_come_close_to_the_best():
    E, H, A = drawn(rank=8)
    best = torch.linalg.eigvalsh(E @ H @ E.t())[:-8].sum().item()
    A_new, B = factors(E, H, A)
    assert best <= weighted_error(E - B @ A_new, H) * (1 + 1e-9) <= 1.02 * best


def test_a_plain_svd_is_worse():
    E, H, A = drawn()
    U, S, Vt = torch.linalg.svd(E)
    A_new, B = factors(E, H, A)
    assert weighted_error(E - B @ A_new, H) < 0.7 * weighted_error(E - (U[:, :5] * S[:5]) @ Vt[:5], H)


def test_rows_show_the_inputs_as_large_as_a_drawn_row_does():
    """a H a is what a drawn row has in expectation: for kaiming's, tr H / (3 columns)."""
    E, H, _ = drawn()
    A = torch.nn.init.kaiming_uniform_(torch.empty(4000, 64, dtype=torch.float64), a=5**0.5)
    wanted = H.trace() / (3 * 64)
    assert abs(((A @ H) * A).sum(1).mean() / wanted - 1) < 0.1
    made, _ = factors(E, H, A[:5] * (64 / 3 / 64) ** 0.5 / A[:5].norm(dim=1, keepdim=True), 2.0)
    assert torch.allclose(((made @ H) * made).sum(1), wanted.expand(5))


def test_rows_beyond_the_rank_of_the_error_stay_as_drawn():
    E, H, A = drawn(rank=6)
    E[3:] = 0
    A_new, B = factors(E, H, A)
    assert torch.equal(A_new[3:], A[3:]) and not B[:, 3:].any()
    assert weighted_error(E - B @ A_new, H) < 1e-12 * weighted_error(E, H)
    nothing, none = factors(torch.zeros_like(E), H, A)
    assert torch.equal(nothing, A) and not none.any()


def test_the_state_of_the_generators_does_not_move():
    before = torch.get_rng_state()
    E, H, _ = drawn()
    principal_directions(E, E @ H, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    principal_directions(torch.eye(4), torch.eye(4), 3)
    assert torch.equal(state, torch.get_rng_state()) and len(before)


def test_gains_are_the_best_factor_of_each_row():
    W, H, _ = drawn()
    V = W + torch.randn_like(W) / 100
    V[0] = 0
    forms = row_forms(W, H, W - V, (W - V) @ H)
    g = forms.gains()
    assert g[0] == 1
    wanted = torch.stack([(w @ H @ v) / (v @ H @ v) for w, v in zip(W[1:], V[1:], strict=True)])
    assert torch.allclose(g[1:], wanted)
    left = W - g.unsqueeze(1) * V
    assert torch.allclose(forms.scaled(g), ((left @ H) * left).sum(1))


def test_the_forms_of_rows_follow_an_update():
    W, H, A = drawn()
    E, B = torch.randn_like(W) / 100, torch.randn(len(W), len(A), dtype=torch.float64) / 100
    left = E - B @ A
    found = row_forms(W, H, E, E @ H).less(B, W @ H @ A.t(), E @ H @ A.t(), A @ H @ A.t())
    wanted = row_forms(W, H, left, left @ H)
    for name in ("ww", "we", "ee"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name)), name
    assert found.ee.sum().item() == pytest.approx(weighted_error(left, H))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_layer_that_gains_nothing_keeps_the_zero_start(method):
    """A weight that NF4 holds exactly, and moments that are no numbers."""
    model = attach_adapters(quantize_(tiny.llama()), method=method, rank=4)
    layer = next(layer for _, layer in named_adapters(model))
    before = [p.detach().clone() for p in layer.parameters(recurse=False)]
    exact = layer.base.frozen.dense(torch.float32)
    H = torch.eye(exact.shape[1])
    assert start_layer(layer, exact.clone(), H).after == 0
    start_layer(layer, exact + 0.01, H * torch.nan)
    start_layer(layer, exact + 0.01, H * 0)
    assert all(torch.equal(one, two) for one, two in zip(before, layer.parameters(recurse=False), strict=True))
    assert start_layer(layer, exact + 0.01, H).after < 1e-6 and layer.lora_B.any()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_errors_told_are_those_of_the_layer(method):
    model = attach_adapters(quantize_(tiny.llama()), method=method, rank=4, alpha=6)
    layer = next(layer for _, layer in named_adapters(model))
    torch.manual_seed(0)
    frozen = layer.base.frozen.dense(torch.float32)
    W, inputs = (
        frozen + 0.02 * torch.randn_like(frozen),
        torch.randn(300, frozen.shape[1]) * torch.rand(frozen.shape[1]),
    )
    H = inputs.t() @ inputs / len(inputs)
    found = start_layer(layer, W, H)
    with torch.no_grad():
        got = layer(inputs) - layer(torch.zeros_like(inputs))
    mean_square = (inputs @ W.t()).square().mean()
    assert found.before == pytest.approx(float((inputs @ (W - frozen).t()).square().mean() / mean_square), rel=1e-4)
    assert found.after == pytest.approx(float((inputs @ W.t() - got).square().mean() / mean_square), rel=1e-3)
    assert found.after < 0.9 * found.before
