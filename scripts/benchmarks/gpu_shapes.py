"""Parts of gpu_suite.py: shapes beside the usual, each beside float64: gradients in bf16, long examples, shared keys,
windows, wide heads, large vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from gpu_bench import Bench, adamw, case, measure_steps
from random_models import attached, build, checkpointing, random_nf4
from torch import Tensor, nn


def apart(found: Tensor, exact: Tensor) -> float:
    """The root of the mean square of the error, relative to that of the values."""
    error = ((found.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def passing(bench: Bench, call: Callable[[], Any]) -> float:
    """Bytes that a call takes on the card beside those that are there; 0 on a CPU."""
    if not bench.cuda:
        call()
        return 0.0
    bench.clean()
    before = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    call()
    return torch.cuda.max_memory_allocated(bench.device) - before


# ---------------------------------------------------------------- gradients

# Of two micro-batches in bf16: u, v and y are rounded to 8 digits, the gradients are not (D8 of the GPU review).
ROUNDED = 4e-3


def part_gradients(bench: Bench) -> None:
    """dx, dA, dB and dm of a layer, and of q, k and v as one, in bf16, beside float64 by the definition."""
    for method in ("lora", "dora"):
        for count in (1, 3):
            name = f"{method}, {'a layer' if count == 1 else 'q, k and v'}"
            with bench.attempt(name):
                for what, error in gradient_errors(bench.device, method, count, bench.small).items():
                    bench.row(f"{name}: d{what} beside float64", error, "relative", most=ROUNDED, must=True)


def gradient_errors(device: torch.device, method: str, count: int, small: bool) -> dict[str, float]:
    from qlora.layers import joined
    from qlora.layers.adapters import AdaptedLinear
    from qlora.layers.linear import NF4Linear
    from qlora.specs import AdapterSpec

    width, tokens = (128, 96) if small else (4096, 1024)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    layers = []
    for _ in range(count):
        with torch.device("meta"):
            base = NF4Linear(width, width, bias=False)
        base.quantized = random_nf4(width, width, generator)
        layer = AdaptedLinear(base, AdapterSpec(method, rank=16, alpha=32.0))
        layer.lora_B.data.copy_(0.02 * normal(width, 16))
        if layer.magnitude is not None:
            layer.magnitude.data *= 1 + 0.1 * normal(width)
        layers.append(layer)
    inputs = [normal(tokens, width).bfloat16().requires_grad_() for _ in range(2)]
    flowing = [[normal(tokens, width).bfloat16() for _ in layers] for _ in inputs]
    for x, dys in zip(inputs, flowing, strict=True):
        ys = joined.products(x, layers) if count > 1 else [layers[0](x)]
        torch.autograd.backward(ys, dys)
    names = ("A", "B", "m")[: 2 if method == "lora" else 3]
    found = {
        name: [p.grad for p in parameters] for name, *parameters in zip(names, *map(learning, layers), strict=True)
    }
    found["x"] = [x.grad for x in inputs]
    exact = {name: [torch.zeros_like(g, dtype=torch.float64) for g in some] for name, some in found.items()}
    for number, layer in enumerate(layers):
        factors = dict(zip(names, (p.detach().double().requires_grad_() for p in learning(layer)), strict=True))
        for i, (x, dys) in enumerate(zip(inputs, flowing, strict=True)):
            x64 = x.detach().double().requires_grad_()
            by_definition(x64, layer, factors).backward(dys[number].double())
            exact["x"][i] += x64.grad
        for name, p in factors.items():
            exact[name][number] += p.grad
    return {name: max(apart(*pair) for pair in zip(found[name], exact[name], strict=True)) for name in found}


def learning(layer) -> list[nn.Parameter]:
    return [p for p in (layer.lora_A, layer.lora_B, layer.magnitude) if p is not None]


def by_definition(x: Tensor, layer, factors: dict[str, Tensor]) -> Tensor:
    """g (W + s B A) x in float64, n constant (arXiv:2402.09353, section 4.3)."""
    from qlora.layers import nf4

    weight = nf4.dequantize(layer.base.quantized, torch.float64) + layer.scaling * factors["B"] @ factors["A"]
    if "m" in factors:
        weight = (factors["m"] / weight.detach().norm(dim=1))[:, None] * weight
    return x @ weight.t()


# ---------------------------------------------------------------- long examples


def part_long(bench: Bench) -> None:
    """One example of 8k, and of 32k tokens, recomputing."""
    import qlora

    shape, lengths = ("small", (96, 192)) if bench.small else ("7B", (8192, 32768))
    base = build(shape, bench.device)
    for method, length, steps in (("lora", lengths[0], 5), ("dora", lengths[0], 5), ("dora", lengths[1], 3)):
        model = attached(base, method)
        checkpointing(model, True)
        with bench.attempt(case(shape, method, length, True)):
            result = measure_steps(bench, model, length, adamw(bench, model, "ours"), steps=steps)
            told(bench, case(shape, method, length, True), length, result)
        base, model = qlora.detach(model), None


def told(bench: Bench, name: str, length: int, result: dict | None) -> None:
    if result is None:  # 32k take 22 GB by the plan: no wonder on a smaller card
        bench.row(name, "out of memory", met=None if length > 8192 else False)
        return
    bench.row(name, length / result["seconds"], "tokens/s")
    bench.row(name, result["peak"] / 1e9, "GB peak")


# ---------------------------------------------------------------- attention

ATTENTION = {  # query heads, key heads, elements of one, window, dtype
    "heads of 128": (32, 32, 128, None, torch.bfloat16),
    "shared keys": (32, 8, 128, None, torch.bfloat16),
    "shared keys, window of 512": (32, 8, 128, 512, torch.bfloat16),
    "heads of 256": (8, 4, 256, None, torch.bfloat16),
    "heads of 256, window of 512": (8, 4, 256, 512, torch.bfloat16),
    "heads of 64, float16": (14, 2, 64, None, torch.float16),
    "shared keys, float32": (32, 8, 128, None, torch.float32),
    "shared keys, float32, window of 512": (32, 8, 128, 512, torch.float32),
}


def part_attention(bench: Bench) -> None:
    """Four packed examples: which kernel ran, its errors beside float64, and what it holds beside [heads, t, t]."""
    lengths = [37, 20, 5, 34] if bench.small else [1500, 1200, 800, 596]
    for name, (heads, groups, size, window, dtype) in ATTENTION.items():
        if bench.small:
            heads, groups, window = max(2, heads // 8), max(1, groups // 8), None if window is None else 16
        with bench.attempt(name):
            attention(bench, name, (heads, groups, size), window, dtype, lengths)


def attention(
    bench: Bench, name: str, shape: tuple[int, int, int], window: int | None, dtype: torch.dtype, lengths: list[int]
) -> None:
    from qlora.layers.attention import NO_MASK, attend, borders
    from qlora.layers.attention_kernels import choose, need_of, offer_of

    heads, groups, size = shape
    tokens, generator = sum(lengths), torch.Generator(bench.device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, n, tokens, size, device=bench.device, generator=generator).to(dtype)
        for n in (heads, groups, groups, heads)
    )
    dout = dout.transpose(1, 2)
    where = borders(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), bench.device)
    given = [x.requires_grad_() for x in (q, k, v)]

    def run() -> Tensor:
        for x in given:
            x.grad = None
        out, _ = attend(nn.Module(), q, k, v, NO_MASK, **where, sliding_window=window, scaling=size**-0.5)
        out.backward(dout)
        return out.detach()

    out = run()
    held = passing(bench, run)
    exact = exact_attention(given, dout, lengths, window)
    errors = [apart(x, y) for x, y in zip([out, *(x.grad for x in given)], exact, strict=True)]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    bench.row(f"{name}: out, dq, dk, dv beside float64", max(errors), "relative", most=limit, must=True)
    kernel = choose(need_of(q, v, window, max(lengths), 0.0), offer_of(q, k, v))
    bench.row(f"{name}: kernel", kernel, met=None if not bench.cuda else kernel != "torch", must=bench.cuda)
    bench.row(f"{name}: forward and backward", bench.seconds(run) * 1e3, "ms")
    if bench.cuda:
        bench.row(f"{name}: {bench.kernels(run)[0][0][0][:50]}", "the dearest kernel")
        table = heads * max(lengths) ** 2 * dtype.itemsize
        bench.row(f"{name}: in passing, of [heads, t, t]", held / table, "x", most=2.0)


def exact_attention(given: list[Tensor], dout: Tensor, lengths: list[int], window: int | None) -> list[Tensor]:
    """out [1, T, heads, d], dq, dk and dv in float64, a head of an example at a time."""
    q, k, v = (x.detach() for x in given)
    share = q.shape[1] // k.shape[1]
    out = torch.zeros_like(dout, dtype=torch.float64)
    gradients = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for start, stop in pairwise(edges):
        part, t = slice(start, stop), stop - start
        seen = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        for head in range(q.shape[1]):
            places = head, head // share, head // share
            own = [x[0, i, part].double().requires_grad_() for x, i in zip((q, k, v), places, strict=True)]
            scores = (own[0] @ own[1].t() * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
            result = scores.softmax(-1) @ own[2]
            result.backward(dout[0, part, head].double())
            out[0, part, head] = result.detach()
            for gradient, x, i in zip(gradients, own, places, strict=True):
                gradient[0, i, part] += x.grad
    return [out, *gradients]


# ---------------------------------------------------------------- vocabularies


def part_vocabulary(bench: Bench) -> None:
    """Head and loss of a frozen head, forward and backward: its gradient beside float64, and its logits' room."""
    sizes = ((1000, 64), (2000, 48)) if bench.small else ((128256, 4096), (262144, 2304))
    for vocabulary, width in sizes:
        with bench.attempt(f"{vocabulary} x {width}"):
            head(bench, f"{vocabulary} x {width}", vocabulary, width)


def head(bench: Bench, name: str, vocabulary: int, width: int) -> None:
    from qlora.layers.loss import HeadLoss

    labels_of, few = (300, 40) if bench.small else (2048, 64)
    generator = torch.Generator(bench.device).manual_seed(0)
    weight = (0.02 * torch.randn(vocabulary, width, device=bench.device, generator=generator)).bfloat16()
    states = torch.randn(labels_of, width, device=bench.device, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (labels_of,), device=bench.device, generator=generator)

    def run(count: int = labels_of) -> tuple[Tensor, Tensor]:
        states.grad = None
        loss = HeadLoss.apply(states[:count], weight, None, labels[:count], 1.0, None)
        loss.backward()
        return loss.detach(), states.grad[:count]

    loss, gradient = run(few)
    exact, exact_gradient = exact_head(states.detach()[:few].double(), weight, labels[:few])
    bench.row(f"{name}: loss beside float64", abs(loss.item() / exact - 1), "relative", most=1e-4, must=True)
    bench.row(f"{name}: gradient beside float64", apart(gradient, exact_gradient), "relative", most=1e-2, must=True)
    bench.row(f"{name}: in passing", passing(bench, run) / 1e9, "GB")
    seconds = bench.seconds(run, 5)
    bench.row(f"{name}: {labels_of} labels, forward and backward", seconds * 1e3, "ms")
    bench.row(f"{name}: {labels_of} labels", 4 * labels_of * vocabulary * width / seconds / 1e12, "TFLOP/s")


def exact_head(states: Tensor, weight: Tensor, labels: Tensor, rows: int = 8192) -> tuple[float, Tensor]:
    """Summed loss and its gradient in float64; some rows of the head at a time, of which all together are 4 GB."""
    parts = [weight[i : i + rows] for i in range(0, weight.shape[0], rows)]
    logits = torch.cat([states @ part.t().double() for part in parts], dim=1)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    slopes = logits.softmax(-1)
    slopes[torch.arange(len(labels), device=labels.device), labels] -= 1
    made = zip(slopes.split(rows, dim=1), parts, strict=True)
    return loss, sum((slope @ part.double() for slope, part in made), torch.zeros_like(states))
