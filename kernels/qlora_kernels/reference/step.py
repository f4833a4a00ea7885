"""What lies between the products of a layer, in plain PyTorch: loss, RMSNorm, gated products, rotary embedding.

Sums are taken in float32 (float64 for float64) and rounded where transformers' modules round. The alternative, leaving
these to transformers' chains of elementwise operators, saves three to five tensors each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.reference.adapter import columnwise_dot
from qlora_kernels.reference.common import mark_mutated, widened


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, vocabulary], targets [n] int64 -> losses [n] = log(sum_k e^(l_k)) - l_target, in float32 (float64 for
    float64).

    The logits become d losses / d logits = softmax - onehot(target), rounded to their dtype.
    """
    mark_mutated(logits)
    wide, at = widened(logits), targets.unsqueeze(1)
    total = wide.logsumexp(1, keepdim=True)
    losses = total - wide.gather(1, at)
    logits.copy_(
        wide.sub_(total).exp_().scatter_(1, at, torch.expm1(-losses))
    )  # p - 1, without the cancellation near p = 1
    return losses.squeeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [rows, n], weight [n] -> y = weight * round(x / rms), and 1 / rms [rows] float32, rms = sqrt(mean(x^2) + eps).

    Rounded to the dtype of x before the weight, as transformers' modules do. arXiv:1910.07467.
    """
    wide = widened(x)
    inverse = 1 / (wide.square().mean(1) + eps).sqrt()
    return weight * (wide * inverse.unsqueeze(1)).to(x.dtype), inverse


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + more [rows, n], and `rms_norm` of it."""
    total = x + more
    return total, *rms_norm(total, weight, eps)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """dx [rows, n] = (g - x^ mean(g x^)) / rms with x^ = x / rms and g = weight * dy; the weight is frozen."""
    g, inverse = widened(dy * weight), inverse.unsqueeze(1)
    normal = widened(x) * inverse
    return ((g - normal * (g * normal).mean(1, keepdim=True)) * inverse).to(x.dtype)


def rms_norm_backward_add(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, onto: Tensor) -> Tensor:
    """dx of `rms_norm_backward` + onto [rows, n]: rounded before it is added, as autograd adds gradients."""
    return rms_norm_backward(dy, x, weight, inverse) + onto


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of one shape, silu(x) = x / (1 + e^-x) rounded to the dtype first. arXiv:2002.05202."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up): dy up s (1 + gate (1 - s)) with s = sigmoid(gate), and dy silu(gate)."""
    return torch.ops.aten.silu_backward(dy * up, gate), dy * torch.nn.functional.silu(gate)


def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` of matrices [tokens, n], and [2, n]: the `columnwise_dot` of d gate with gate and of d up with
    up.
    """
    dgate, dup = swiglu_backward(dy, gate, up)
    return dgate, dup, torch.stack((columnwise_dot(dgate, gate), columnwise_dot(dup, up)))


def swiglu_joined(y: Tensor) -> Tensor:
    """`swiglu` of the halves (gate, up) of y [tokens, 2 n]."""
    return swiglu(*y.chunk(2, dim=1))


def swiglu_joined_backward(dh: Tensor, y: Tensor, dots: bool) -> tuple[Tensor, Tensor]:
    """dy [tokens, 2 n] of dh [tokens, n], and [2 n]: the `columnwise_dot` of dy with y, or [0] without `dots`."""
    gate, up = y.chunk(2, dim=1)
    dy = torch.cat(swiglu_backward(dh, gate, up), dim=1)
    return dy, columnwise_dot(dy, y) if dots else widened(y[:0, 0])


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up of one shape, rounded to the dtype before the product. arXiv:2002.05202.

    gelu(x) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3), which equals x (1 + tanh(z)) / 2: the tanh
    approximation, as in Gemma, not the exact x Phi(x).
    """
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up): dy up (s + gate s (1 - s) 2 z') with s = sigmoid(2 z(gate)), and dy gelu(gate).

    The slope goes to 0 and 1. Where z' overflows, from |gate| of 1e19 on, PyTorch's float32 has no number for it, and a
    kernel has the limit.
    """
    dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
    return dgate, dy * torch.nn.functional.gelu(gate, approximate="tanh")


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    x, half = x.unflatten(0, (-1, cos.shape[0])), x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., half:] if back else sin[..., :half], value=1 if back else -1)
    y[..., half:].addcmul_(x[..., :half], sin[..., :half] if back else sin[..., half:], value=-1 if back else 1)
    return y.flatten(0, 1)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + (-x2, x1) sin for x = (x1, x2) in each head of q [tokens, heads, D] and of k [tokens, groups, D].
    arXiv:2104.09864.

    cos, sin [positions, D] of their dtype, tokens a multiple of positions: token t is turned by row t % positions.
    """
    return _turned(q, cos, sin), _turned(k, cos, sin)


def rotate_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of what was turned: turned by the transposed matrix."""
    return _turned(dq, cos, sin, back=True), _turned(dk, cos, sin, back=True)
