"""What test_triton.py runs in a process of its own: every Triton kernel against the reference, in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/support/triton_interpret.py

One line for each check: its name, a tab, "ok". The interpreter replaces the compiler when Triton is imported, so one
process cannot do both; it works in float32 on CPU tensors.
Triton 3.6 interprets with numpy before 2.4 only: it makes numbers of arrays of one element, which numpy refuses since.
Its compiler is not concerned.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from launches import OURS, Launches
from triton.runtime import interpreter
from triton_model import check_model

from qlora_kernels import reference
from qlora_kernels.triton import adapter, nf4, optim, step
from qlora_kernels.weight import NF4_LEVELS, QuantizedWeight

NESTED = 256
NF4 = torch.tensor(NF4_LEVELS)
OTHER = torch.arange(-5, 11) / 10  # a codebook of another shape: its 0 is level 5
CPU = torch.device("cpu")


def weight(rows: int, columns: int, levels: torch.Tensor = NF4) -> torch.Tensor:
    """Gaussian with rows of zeros, ties between levels, tiny and huge blocks."""
    values = torch.randn(rows, columns)
    flat = values.view(-1)
    flat[: flat.numel() // 3] = reference.midpoints_of(levels)[torch.randint(15, (flat.numel() // 3,))]
    flat[: flat.numel() // 3 : 16] = 1.0
    values[rows // 2] = 0
    values[-1] *= 1e-39
    return values


def quantized(rows: int, columns: int, blocksize: int, nested: bool, levels: torch.Tensor = NF4) -> QuantizedWeight:
    """Gaussian, by the reference."""
    packed, absmax = reference.quantize_4bit(torch.randn(rows, columns), levels, blocksize)
    scales = reference.quantize_absmax(absmax, NESTED) if nested else (absmax,)
    return QuantizedWeight.of(packed, scales, (rows, columns), blocksize, NESTED, levels)


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), (a.flatten()[:8], b.flatten()[:8])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert ((a - b).abs().max() <= tolerance * b.abs().max()).item(), (a - b).abs().max() / b.abs().max()


def check_encoding(rows: int, columns: int, blocksize: int, levels: torch.Tensor = NF4) -> None:
    w = weight(rows, columns, levels)
    packed, absmax = nf4.quantize_4bit(w, levels, blocksize)
    expected, expected_absmax = reference.quantize_4bit(w, levels, blocksize)
    equal(packed, expected)
    equal(absmax, expected_absmax)
    scales = reference.fit_scales_4bit(w, levels, blocksize)
    equal(nf4.fit_scales_4bit(w, levels, blocksize), scales)
    scales = scales * torch.tensor([1.0, -0.6, 0.0]).repeat(scales.numel())[: scales.numel()]
    equal(nf4.encode_4bit(w, levels, scales, blocksize), reference.encode_4bit(w, levels, scales, blocksize))
    for got, wanted in zip(nf4.quantize_absmax(absmax, NESTED), reference.quantize_absmax(absmax, NESTED), strict=True):
        equal(got, wanted)


def check_decoding(rows: int, columns: int, blocksize: int, levels: torch.Tensor = NF4) -> None:
    for nested in (True, False):
        w = quantized(rows, columns, blocksize, nested, levels)
        for row_scale in (None, torch.randn(rows)):
            arguments = (w.parts, w.layout, row_scale, torch.float32)
            equal(nf4.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))
        arguments = (torch.randn(columns), w.parts, w.layout)
        y = nf4.gemv_4bit(*arguments)
        if columns % blocksize:
            assert y is NotImplemented
        else:
            close(y, reference.gemv_4bit(*arguments))


def check_row_norms(rows: int, columns: int, rank: int, levels: torch.Tensor = NF4) -> None:
    w = quantized(rows, columns, 64, nested=True, levels=levels)
    W = reference.dequantize_4bit(w.parts, w.layout, None, torch.float32)
    A, B = torch.randn(rank, columns), torch.randn(rows, rank)
    A[0], B[rows // 2], B[rows // 2, 0] = W[rows // 2], 0, -1 / 1.999  # the sums cancel in this row
    for a, b, scaling in ((A, B, 1.999), (A[:1] * 0, B[:, :1] * 0, 1.0)):
        arguments = (w.parts, w.layout, a, b, scaling)
        n, expected = adapter.row_norms_4bit(*arguments), reference.row_norms_4bit(*arguments)
        if columns % 64:
            assert n is NotImplemented
            continue
        close(n, expected)
        row = rows // 2
        assert abs(n[row] - expected[row]) <= 1e-4 * W[row].norm(), (n[row], expected[row])


def check_many_row_norms() -> None:
    """Layers of three shapes, of one a pair, the last misaligned: the same bits as each alone."""
    for nested in (True, False):
        layers = []
        for rows, columns, rank in ((70, 192, 3), (5, 64, 3), (70, 192, 3), (9, 77, 3), (5, 64, 3)):
            # The levels of a pair are equal, but not one tensor.
            w = quantized(rows, columns, 64, nested, NF4.clone())
            A, B = torch.randn(rank, columns), torch.randn(rows, rank)
            if len(layers) == 4:
                B = torch.randn(rank * rows + 1)[1:].view(rows, rank)
            layers.append((w.parts, w.layout, A, B, 0.5 + len(layers)))
        weights, layouts, *rest = (list(part) for part in zip(*layers, strict=True))
        together = adapter.row_norms_4bit_all(list(chain(*weights)), list(chain(*layouts)), *rest)
        for n, layer in zip(together, layers, strict=True):
            alone = adapter.row_norms_4bit(*layer)
            equal(n, reference.row_norms_4bit(*layer) if layer[1][1] == 77 else alone)
            close(n, reference.row_norms_4bit(*layer))
    assert adapter.row_norms_4bit_all([], [], [], [], []) == []


def check_columnwise_dot(tokens: int, columns: int) -> None:
    a, b = torch.randn(tokens, columns + 3)[:, :columns], torch.randn(tokens, columns)
    close(adapter.columnwise_dot(a, b), reference.columnwise_dot(a, b))
    close(adapter.columnwise_dot(b.t(), a.t()), reference.columnwise_dot(b.t(), a.t()))


def check_adapter_gradients(tokens: int, columns: int, rank: int) -> None:
    shapes = ((tokens, columns), (tokens, columns), (tokens, rank), (columns, rank))
    dy, y, xA, B_scaled = (torch.randn(*shape) for shape in shapes)
    row_scale, m_clamped = torch.randn(columns), torch.rand(columns) + 0.1
    arguments = (dy, B_scaled, xA, y, row_scale, m_clamped, 0.7)
    found, expected = adapter.adapter_gradients(*arguments), reference.adapter_gradients(*arguments)
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted)
    for others in ((None, row_scale, m_clamped), (None, None, None)):  # LoRA has only products
        assert adapter.adapter_gradients(dy, B_scaled, xA, *others, 0.7) is NotImplemented


def check_joined(tokens: int, columns: int, rank: int, *rows: int) -> None:
    """Layers of one input as one: their weights, their factors, their gradients."""
    As, Bs = [torch.randn(rank, columns) for _ in rows], [torch.randn(n, rank) for n in rows]
    ms, ns, outs = [torch.randn(n) for n in rows], [torch.rand(n) + 0.1 for n in rows], list(rows)
    factors = torch.empty(0)
    for nested in (True, False):
        weights = [quantized(n, columns, 64, nested) for n in rows]
        lists = list(chain(*(w.parts for w in weights))), list(chain(*(w.layout for w in weights)))
        for given in (([], []), (ms, ns)):
            arguments = (As, Bs, *given, 0.7, *lists, torch.float32)
            found, expected = adapter.adapted_operands(*arguments), reference.adapted_operands(*arguments)
            factors = expected[3]
            if columns % 64 and len(rows) > 1:
                assert found is NotImplemented
                continue
            for got, wanted in zip(found, expected, strict=True):
                equal(got, wanted)
        for row_scale in (None, factors[0]):
            arguments = (*lists, row_scale, torch.float32)
            decoded = nf4.dequantize_4bit_joined(*arguments)
            if columns % 64:
                assert decoded is NotImplemented
                continue
            equal(decoded, reference.dequantize_4bit_joined(*arguments))
    dy, y, B = torch.randn(tokens, sum(rows)), torch.randn(tokens, sum(rows)), torch.randn(sum(rows), rank * len(rows))
    xA, dots = torch.randn(tokens, rank * len(rows)), torch.randn(sum(rows))
    none = factors[:, :0]
    for *sums, numbers in ((None, None, none), (y, None, factors), (None, dots, factors)):
        arguments = (dy, B, xA, *sums, numbers, outs, 0.7)
        for got, wanted in zip(
            adapter.joined_gradients(*arguments), reference.joined_gradients(*arguments), strict=True
        ):
            close(got, wanted) if wanted.numel() else equal(got, wanted)
    assert adapter.joined_gradients(dy, B, xA, y, None, none, outs, 0.7) is NotImplemented


def check_factors(rank: int, columns: int, rows: int) -> None:
    A, B, m, n = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(rows), torch.rand(rows)
    m[0], n[-1] = -1e-9, 0.0
    for parts in ((m, n), (None, None)):
        arguments = (A, B, *parts, 0.7, torch.float32)
        found, expected = adapter.prepare_lora_factors(*arguments), reference.prepare_lora_factors(*arguments)
        for got, wanted in zip(found, expected, strict=True):
            equal(got, wanted)
    m[rows // 2] = math.nan
    scaled = adapter.prepare_lora_factors(A, B, m, n, 0.7, torch.float32)[1]
    assert scaled.isnan().any(1).nonzero().tolist() == [[rows // 2]]


def check_layers(rows: int, columns: int) -> None:
    x, dy, up = (torch.randn(rows, columns) for _ in range(3))
    w = torch.rand(columns)
    y, inverse = step.rms_norm(x, w, 1e-6)
    expected, expected_inverse = reference.rms_norm(x, w, 1e-6)
    close(y, expected)
    close(inverse, expected_inverse)
    # Of one column nothing is left but rounding: what is left is held against what cancels.
    dx, expected_dx = (f(dy, x, w, expected_inverse) for f in (step.rms_norm_backward, reference.rms_norm_backward))
    assert (dx - expected_dx).abs().max() <= 2e-6 * (w * dy * expected_inverse.view(-1, 1)).abs().max()
    close(step.swiglu(x, up), reference.swiglu(x, up))
    for got, wanted in zip(step.swiglu_backward(dy, x, up), reference.swiglu_backward(dy, x, up), strict=True):
        close(got, wanted)
    for got, wanted in zip(
        step.swiglu_backward_dots(dy, x, up), reference.swiglu_backward_dots(dy, x, up), strict=True
    ):
        close(got, wanted)
    y = torch.cat((x, up), dim=1)
    close(step.swiglu_joined(y), reference.swiglu_joined(y))
    for dots in (False, True):
        found, expected = step.swiglu_joined_backward(dy, y, dots), reference.swiglu_joined_backward(dy, y, dots)
        for got, wanted in zip(found, expected, strict=True):
            close(got, wanted) if wanted.numel() else equal(got, wanted)


def check_launches() -> None:
    """As many as `launches.OURS` says, by which the launches of a step are counted."""
    rows = [70, 6]
    w = [quantized(n, 192, 64, nested=True) for n in rows]
    A, B, m = (
        [torch.randn(*shape) for shape in shapes] for shapes in ([(3, 192)] * 2, [(70, 3), (6, 3)], [(70,), (6,)])
    )
    x, y = torch.randn(5, 192), torch.randn(5, 76)
    heads, cos, factors = torch.randn(5, 4, 16), torch.randn(5, 16), torch.randn(2, 76)
    parts, layouts = [*w[0].parts, *w[1].parts], [*w[0].layout, *w[1].layout]
    cases = {
        "dequantize_4bit": (nf4, (w[0].parts, w[0].layout, m[0], torch.float32)),
        "dequantize_4bit_joined": (nf4, (parts, layouts, factors[0], torch.float32)),
        "prepare_lora_factors": (adapter, (A[0], B[0], m[0], m[0], 1.0, torch.float32)),
        "adapted_operands": (adapter, (A, B, m, m, 1.0, parts, layouts, torch.float32)),
        "adapter_gradients": (adapter, (y, torch.randn(76, 3), x[:, :3], y, *factors, 1.0)),
        "joined_gradients": (adapter, (y, torch.randn(76, 6), x[:, :6], y, None, factors, rows, 1.0)),
        "columnwise_dot": (adapter, (y, y)),
        "rms_norm": (step, (x, x[0], 1e-6)),
        "rms_norm_backward": (step, (x, x, x[0], x[:, 0].contiguous())),
        "swiglu_joined": (step, (x,)),
        "swiglu_joined_backward": (step, (x[:, :96].contiguous(), x, True)),
        "rotate": (step, (heads, heads, cos, cos)),
        "rotate_backward": (step, (heads, heads, cos, cos)),
    }
    begin, grids = type(interpreter.interpreter_builder).set_grid_dim, []

    def counted(self, *grid) -> None:
        grids.append(grid)
        begin(self, *grid)

    type(interpreter.interpreter_builder).set_grid_dim = counted
    try:
        for name, (module, arguments) in cases.items():
            grids.clear()
            with Launches() as products:
                getattr(module, name)(*arguments)
            found = len(grids) + sum(products.found[product] for product in ("mm", "mul", "div"))
            assert found == OURS.get(name, 1), (name, grids, products.found)
    finally:
        type(interpreter.interpreter_builder).set_grid_dim = begin


def check_rotation(tokens: int, heads: int, groups: int, width: int, positions: int) -> None:
    """Of parts of one matrix, as a product of q, k and v makes them, and of heads before tokens, as attention's
    gradients come.
    """
    whole = torch.randn(tokens, heads + groups + 1, width)
    cos, sin = torch.randn(positions, width), torch.randn(positions, width)
    turned = torch.randn(heads, tokens, width).transpose(0, 1)
    for q in (whole[:, :heads], turned):
        for name in ("rotate", "rotate_backward"):
            arguments = (q, whole[:, heads : heads + groups], cos, sin)
            for got, wanted in zip(getattr(step, name)(*arguments), getattr(reference, name)(*arguments), strict=True):
                assert got.is_contiguous()
                close(got, wanted)
    assert step.rotate(whole, whole, cos.double(), sin) is NotImplemented


def check_loss(rows: int, vocabulary: int) -> None:
    logits, targets = 5 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    logits[-1] = 0
    logits[-1, targets[-1]] = 15 + math.log(vocabulary)  # p near 1: the gradient p - 1 has to keep its digits
    expected, exact = logits.clone(), logits.double()
    reference.cross_entropy_(exact, targets)
    close(step.cross_entropy_(logits, targets), reference.cross_entropy_(expected, targets))
    close(logits, expected)
    if vocabulary > 1:
        close(logits[-1, targets[-1]].double(), exact[-1, targets[-1]], 1e-4)


def check_adamw(n: int) -> None:
    """One piece, and several with gaps between them, in which the moments stay 0."""
    for ranges in ([slice(0, n)], [slice(0, n // 3), slice(n // 3, n // 2), slice(n // 2 + 1, n)]):
        p, g, m, v = (torch.zeros(n) for _ in range(4))
        for part in ranges:
            p[part], g[part], m[part], v[part] = (torch.randn(part.stop - part.start) for _ in range(4))
        v = v.square() * 1e-4
        for decay in (1.0, 0.99):
            scalars = [0.9, 0.999, 1e-8, decay, 3e-3, 0.3, 0.7]
            expected = [t.clone() for t in (p, g, m, v)]
            for code, (a, b, *moments) in ((reference, expected), (optim, (p, g, m, v))):
                code.adamw_(
                    [a[part] for part in ranges],
                    [b[part] for part in ranges],
                    [part.start for part in ranges],
                    *moments,
                    torch.empty(3, n),
                    scalars,
                )
            for got, wanted in zip((p, g, m, v), expected, strict=True):
                close(got, wanted, 5e-7)


def check_blocks(n: int, blocksize: int) -> None:
    for signed in (True, False):
        midpoints = reference.block_tables(CPU, signed)[1]
        values = torch.randn(n) * 10.0 ** torch.randint(-9, 3, (n,))
        values[: n // 4] = midpoints.repeat(n)[: n // 4]  # ties, where the block's largest magnitude is 1
        values[: n // 4 : blocksize] = 1.0
        values[n // 4 : n // 4 + blocksize] = 0.0
        values = values if signed else values.abs()
        codes, absmax, work = (
            torch.empty(n, dtype=torch.uint8),
            torch.empty(n // blocksize),
            torch.empty(n, dtype=torch.int32),
        )
        expected, expected_absmax = torch.empty_like(codes), torch.empty_like(absmax)
        optim.encode_blocks_into(codes, absmax, values, work, blocksize, signed)
        reference.encode_blocks_into(expected, expected_absmax, values.clone(), work, blocksize, signed)
        equal(codes, expected)
        equal(absmax, expected_absmax)
        optim.decode_blocks_into(values, codes, absmax, work, blocksize, signed)
        wanted = torch.empty(n)
        reference.decode_blocks_into(wanted, codes, absmax, work, blocksize, signed)
        equal(values, wanted)


def check_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.ones(131)
        w[65] = bad
        for scales in (nf4.quantize_4bit(w, NF4, 64)[1], nf4.fit_scales_4bit(w, NF4, 64)):
            assert scales.isfinite().tolist() == [True, False, True], bad


INTERPRETED = {
    **{
        f"encoding {r}x{c} blocks of {b}": (check_encoding, r, c, b)
        for r, c, b in ((1, 1, 64), (33, 77, 64), (70, 192, 32), (3, 1500, 256))
    },
    **{
        f"decoding {r}x{c} blocks of {b}": (check_decoding, r, c, b)
        for r, c, b in ((1, 1, 64), (7, 64, 32), (33, 77, 64), (70, 192, 64), (3, 8192, 4096))
    },
    **{
        f"row norms {r}x{c} rank {k}": (check_row_norms, r, c, k)
        for r, c, k in ((5, 64, 3), (70, 1088, 17), (9, 77, 3), (6, 128, 80))
    },
    "row norms of many layers": (check_many_row_norms,),
    **{f"columnwise dot {t}x{c}": (check_columnwise_dot, t, c) for t, c in ((1, 1), (3, 200), (300, 130))},
    **{
        f"gradients {t}x{c} rank {k}": (check_adapter_gradients, t, c, k)
        for t, c, k in ((1, 1, 1), (3, 200, 16), (150, 130, 3), (5, 64, 80))
    },
    **{
        f"joined {t}x{c} rank {k}, {', '.join(map(str, rows))} rows": (check_joined, t, c, k, *rows)
        for t, c, k, rows in ((1, 64, 1, (1, 1)), (150, 192, 17, (130, 6, 70)), (3, 77, 4, (300, 7)), (2, 64, 16, (5,)))
    },
    **{f"layers {r}x{c}": (check_layers, r, c) for r, c in ((1, 1), (5, 77), (3, 1088), (150, 130))},
    **{
        f"factors rank {k}, {c} to {r}": (check_factors, k, c, r)
        for k, c, r in ((1, 1, 1), (3, 70, 33), (16, 1088, 300), (80, 64, 5))
    },
    **{
        f"rotation {t} tokens {h}+{g} heads of {d}": (check_rotation, t, h, g, d, p)
        for t, h, g, d, p in ((1, 1, 1, 2, 1), (6, 5, 2, 20, 3), (3, 40, 1, 64, 3))
    },
    **{f"loss {r}x{c}": (check_loss, r, c) for r, c in ((1, 1), (3, 77), (2, 9001))},
    **{f"adamw {n}": (check_adamw, n) for n in (1, 1000, 2500)},
    **{f"8-bit {n} blocks of {b}": (check_blocks, n, b) for n, b in ((256, 256), (5 * 256, 256), (40 * 64, 64))},
    "not finite": (check_not_finite,),
    "another codebook, encoding": (check_encoding, 33, 77, 64, OTHER),
    "another codebook, decoding": (check_decoding, 70, 192, 64, OTHER),
    "another codebook, row norms": (check_row_norms, 70, 192, 3, OTHER),
    "launches": (check_launches,),
    "a model's steps": (check_model,),
}


def interpret() -> None:
    torch.use_deterministic_algorithms(True)  # every `torch.empty` comes filled with NaN, or with the largest integer
    for name, (check, *sizes) in INTERPRETED.items():
        torch.manual_seed(0)
        check(*sizes)
        print(f"{name}\tok", flush=True)


if __name__ == "__main__":
    interpret()
