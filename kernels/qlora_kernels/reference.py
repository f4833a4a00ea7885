"""Every operator in plain PyTorch, computed in float32: the specification, and the fallback on every device.

NF4 (QLoRA, arXiv:2305.14314, section 3 and appendix E), byte for byte as bitsandbytes stores it:
    codes    weight flattened row-major, blocks of `blocksize`; x = w * (1 / absmax); nearest of 16 levels, ties to the lower
             code; byte k = code[2k] << 4 | code[2k+1]; the pad nibble of an odd tail is 7 (the level 0)
    absmax   largest magnitude of a block, float32; a block of zeros has absmax 0 and code 7 throughout
    nested   offset = mean(absmax); (absmax - offset) in blocks of 256 to the signed 8-bit dynamic map (arXiv:1511.04561)
    decode   level[code] * (map[q] * nested_absmax + offset), two roundings to float32 in that order, then one to `dtype`
DoRA (arXiv:2402.09353) adds two reductions: `column_dots`, and the row norms of W + s B A without a dense B A
(`row_norms`). Work goes by chunks of whole blocks, so that the float32 temporaries stay at a few tens of MB whatever
the size of the weight. The alternative, decoding through an int64 index of every element, costs sixteen times the
memory of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # a multiple of every block size; float32 temporaries of 1 MB stay in the cache
FIT = (
    32,
    *range(24, 47),
)  # scales tried by `fit_scales_nf4`: absmax * k / 32; absmax itself is kept where others are no better
TINY = 1e-38  # smaller block maxima are treated as this one, so that 1 / absmax stays finite

# Quantiles of N(0, 1) between 1 - 0.9677083 and 0.9677083, scaled to [-1, 1], with an exact zero. tests derive them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels, float32 [16], on `device`."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """The 8-bit dynamic data type, float32 [256], ascending (arXiv:1511.04561; 7 exponent bits).

    Decade 10^(i-6), i = 0..6, is cut into 2^i equal parts of [0.1, 1] and contributes their centres, with both signs;
    unsigned into 2^(i+1). 0 and 1 complete the 256 values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float32)
        centres = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += centres.tolist() + ((-centres).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _midpoints(device: torch.device, nested: bool) -> Tensor:
    levels = dynamic_map(device) if nested else nf4_levels(device)
    return (levels[:-1] + levels[1:]) / 2


@functools.cache
def _byte_table(device: torch.device) -> Tensor:
    """float32 [256, 2]: the two levels that a byte stands for, high nibble first."""
    levels = nf4_levels(device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).contiguous()


def _blocks(values: Tensor, blocksize: int) -> Tensor:
    """float32 [blocks, blocksize], zeros behind the last value."""
    return torch.nn.functional.pad(values.float(), (0, -values.numel() % blocksize)).view(-1, blocksize)


def _encode(values: Tensor, blocksize: int, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int32, flat) and block maxima of one chunk of flat float values; the last block may be short."""
    n = values.numel()
    blocks = _blocks(values, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)).clamp_(-1, 1)
    return torch.bucketize(scaled, midpoints, out_int32=True).view(-1)[:n], absmax


def _pack(codes: Tensor, out: Tensor) -> None:
    """Two codes a byte to the start of `out`; an odd one is followed by code 7."""
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7).to(torch.uint8)
    out[: codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]


def quantize_nf4(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """weight, any shape and float dtype -> packed uint8 [(n+1)//2, 1], absmax float32 [ceil(n / blocksize)]."""
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    midpoints = _midpoints(flat.device, nested=False)
    for start in range(0, n, CHUNK_ELEMENTS):
        chunk = flat[start : start + CHUNK_ELEMENTS]
        codes, maxima = _encode(chunk, blocksize, midpoints)
        _pack(codes, packed[start // 2 :, 0])
        block = start // blocksize
        absmax[block : block + maxima.numel()] = maxima
    return packed, absmax


def _lane_sum(values: Tensor) -> Tensor:
    """Sums of [blocks, blocksize]: 16 lanes in order, then the lanes in halves, so that every implementation gets the
    same bits.
    """
    lanes = values.view(values.shape[0], -1, 16).unbind(1)
    total = sum(lanes[1:], start=lanes[0])
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total.squeeze(1)


def fit_scales_nf4(weight: Tensor, blocksize: int) -> Tensor:
    """weight -> the scale of each block that leaves the least squared error, float32 [ceil(n / blocksize)].

    A candidate scale gives nearest levels l. For those levels the best scale is sum(w l) / sum(l l), and it leaves
    sum(w w) - sum(w l)^2 / sum(l l): the candidate with the largest last term wins. `blocksize` a multiple of 16.
    """
    flat = weight.reshape(-1)
    scales = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    levels, midpoints = nf4_levels(flat.device), _midpoints(flat.device, nested=False)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        blocks = _blocks(flat[start : start + CHUNK_ELEMENTS], blocksize)
        absmax = blocks.abs().amax(dim=1)
        blocks = blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
        factor = torch.ones_like(absmax)
        best = torch.full_like(absmax, -1.0)
        for candidate in FIT:
            stretched = (blocks * torch.tensor(32.0 / candidate, device=flat.device)).clamp_(-1, 1)
            nearest = levels[torch.bucketize(stretched, midpoints, out_int32=True)]
            wl, ll = _lane_sum(blocks * nearest), _lane_sum(nearest * nearest)
            gain = wl * wl / ll
            better = (ll > 0) & (gain > best) & absmax.isfinite()
            best = torch.where(better, gain, best)
            factor = torch.where(better, wl / ll, factor)
        scales[start // blocksize : start // blocksize + absmax.numel()] = absmax * factor
    return scales


def encode_nf4(weight: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """weight, scales float32 [ceil(n / blocksize)] -> packed uint8 [(n+1)//2, 1]: the nearest levels of w * (1 /
    scale).

    For scales that are not absmax, or absmax as double quantization decodes it. A scale below 1e-38 counts as 0 and
    takes code 7.
    """
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    midpoints = _midpoints(flat.device, nested=False)
    inverse = torch.where(scales.abs() > TINY, 1.0 / scales, 0.0)
    for start in range(0, n, CHUNK_ELEMENTS):
        chunk = flat[start : start + CHUNK_ELEMENTS]
        blocks = _blocks(chunk, blocksize)
        block = start // blocksize
        scaled = (blocks * inverse[block : block + blocks.shape[0]].unsqueeze(1)).clamp_(-1, 1)
        _pack(torch.bucketize(scaled, midpoints, out_int32=True).view(-1)[: chunk.numel()], packed[start // 2 :, 0])
    return packed


def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """absmax float32 [k] -> codes uint8 [k], nested_absmax float32 [ceil(k / nested_blocksize)], offset float32 []."""
    offset = absmax.mean()
    codes, nested = _encode(absmax - offset, nested_blocksize, _midpoints(absmax.device, nested=True))
    return codes.to(torch.uint8), nested, offset


@functools.cache
def block_tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """(values [256], midpoints [255]) of the dynamic map for blocks. Unsigned, every value above 0 is nearer to the
    smallest code than
    to that of 0: a second moment that was rounded to 0 would make its step m / eps.
    """
    levels = dynamic_map(device, signed)
    midpoints = (levels[:-1] + levels[1:]) / 2
    if not signed:
        midpoints[0] = 0
    return levels, midpoints


def encode_blocks_into(
    codes: Tensor, absmax: Tensor, values: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    """values float32 [n], whole blocks -> codes uint8 [n], absmax float32 [n / blocksize]: 8-bit state
    (arXiv:2110.02861).

    `work` int32 [n] and `values` are used up, so that nothing is allocated.
    """
    scaled, wide = values.view(-1, blocksize), work.view(torch.float32)
    torch.amax(torch.abs(scaled, out=wide.view(-1, blocksize)), dim=1, out=absmax)
    inverse = torch.clamp_min(absmax, TINY, out=wide[: absmax.numel()]).reciprocal_()
    scaled.mul_(inverse.unsqueeze(1))
    codes.copy_(torch.bucketize(values, block_tables(values.device, signed)[1], out_int32=True, out=work))


def decode_blocks_into(
    values: Tensor, codes: Tensor, absmax: Tensor, work: Tensor, blocksize: int, signed: bool
) -> None:
    """The inverse: code's value times its block's largest magnitude; `work` int32 [n] is used up."""
    torch.index_select(block_tables(values.device, signed)[0], 0, work.copy_(codes), out=values)
    values.view(-1, blocksize).mul_(absmax.unsqueeze(1))


def adamw_(
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    at: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    work: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step_size: float,
    correction: float,
    scale: float,
) -> None:
    """One step of AdamW (arXiv:1711.05101) in place, of contiguous tensors p with gradients scale g:

        m = lerp(m, g, 1 - beta1)    v = beta2 v + (1 - beta2) g^2    p = decay p - step_size m / (sqrt(v) / correction + eps)

    with decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^t), correction = sqrt(1 - beta2^t). The moments of
    p[i] are those from at[i] of exp_avg and exp_avg_sq [n]; those between are 0 and stay so. They and work [3, n or
    more], which is used up so that nothing is allocated, have the dtype of the arithmetic. The operations and their
    order are those of torch.optim.AdamW(foreach=False): the same bits, wherever a tensor is cut.
    """
    count_write(p)
    values, gradient, root = work[:, : exp_avg.numel()]
    pieces, places = gathered(p, g, at, values, gradient)
    gradient.mul_(scale)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    torch.sqrt(exp_avg_sq, out=root).div_(correction).add_(eps)
    if decay != 1:
        values.mul_(decay)
    values.addcdiv_(exp_avg, root, value=-step_size)
    torch._foreach_copy_(pieces, places)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all tensors, a scalar."""
    return torch.nn.utils.get_total_norm(tensors)


def gathered(
    p: Sequence[Tensor], g: Sequence[Tensor], at: Sequence[int], values: Tensor, gradient: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Copy p[i] and g[i] to `values` and `gradient` from at[i] on, zeros between the gradients; returns p flat, and
    where it lies in `values`.
    """
    pieces = [x.view(-1) for x in p]
    ranges = [slice(first, first + x.numel()) for first, x in zip(at, pieces, strict=True)]
    places = [values[part] for part in ranges]
    if sum(x.numel() for x in pieces) < gradient.numel():
        gradient.zero_()
    torch._foreach_copy_(places, pieces)
    torch._foreach_copy_([gradient[part] for part in ranges], [x.view(-1) for x in g])
    return pieces, places


def decode_absmax(
    absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None, nested_blocksize: int
) -> Tensor:
    """Block scales float32 [k], from the 8-bit codes of double quantization or as they are."""
    if nested_absmax is None:
        return absmax
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return (
        torch.nn.functional.embedding(absmax.int(), dynamic_map(absmax.device).unsqueeze(1)).squeeze(1) * scale
        + nested_offset
    )


def _decode(flat: Tensor, scales: Tensor, start: int, stop: int, blocksize: int) -> Tensor:
    """Elements start..stop as float32; `start` on the border of a block."""
    values = torch.nn.functional.embedding(flat[start // 2 : (stop + 1) // 2].int(), _byte_table(flat.device)).view(-1)
    scale = scales[start // blocksize : -(-stop // blocksize)].unsqueeze(1)
    values = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize) * scale
    return values.view(-1)[: stop - start]


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    row_gain: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """-> dense [rows, columns] in `dtype`. `row_gain` [rows] multiplies the block scales of its row before the level is
    applied; where a block crosses rows, or in float64, it multiplies the decoded float32 value instead."""
    n = rows * columns
    scales = decode_absmax(absmax, nested_absmax, nested_offset, nested_blocksize)
    if row_gain is not None and dtype != torch.float64:
        row_gain = row_gain.float()
    gain_in_scales = columns % blocksize == 0 and dtype != torch.float64
    if row_gain is not None and gain_in_scales:
        scales = (scales.view(rows, -1) * row_gain.unsqueeze(1)).view(-1)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    for start in range(0, n, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, n)
        values = _decode(packed.view(-1), scales, start, stop, blocksize)
        if row_gain is not None and not gain_in_scales:
            values = values * row_gain[torch.arange(start, stop, device=packed.device) // columns]
        out[start:stop] = values
    return out.view(rows, columns)


def count_write(out: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that `out` was written: below its dispatch level torch no longer does so by itself."""
    torch.autograd.graph.increment_version(
        [x for x in ((out,) if isinstance(out, Tensor) else out) if not x.is_inference()]
    )


def dequantize_nf4_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    row_gain: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """`dequantize_nf4` to `out` [rows, columns], in its dtype."""
    rows, columns = out.shape
    count_write(out)
    out.copy_(
        dequantize_nf4(
            packed,
            absmax,
            nested_absmax,
            nested_offset,
            row_gain,
            rows,
            columns,
            blocksize,
            nested_blocksize,
            out.dtype,
        )
    )


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """a, b [tokens, out] -> sum over tokens of a * b, [out]: summed in float32, or in float64 where one of them is
    float64.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    total = torch.zeros(a.shape[1], dtype=wide, device=a.device)
    step = max(1, CHUNK_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, a.shape[0], step):
        total += (a[start : start + step].to(wide) * b[start : start + step].to(wide)).sum(0)
    return total


def guarded(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(m, n) safe to divide by: n away from 0 (rows of zeros), |m| at least 1e-6 n with m's sign. Used forward and
    backward alike.
    """
    n = n.clamp(min=1e-12)
    return torch.copysign(torch.maximum(m.abs(), 1e-6 * n), m), n


def fold_factors(
    A: Tensor, B: Tensor, m: Tensor | None, n: Tensor | None, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [r, in], B [out, r], m and n [out] -> A and diag(gain) s B in `dtype`, gain = m / n, and the `guarded` m;
    without m the last two are empty.
    """
    up = scaling * B
    gain, safe = B.new_empty(0), B.new_empty(0)
    if m is not None:
        safe, n = guarded(m, n)
        gain = safe / n
        up = up * gain.unsqueeze(1)
    return A.to(dtype, copy=True), up.to(dtype), gain, safe


def token_product(left: Tensor, x: Tensor) -> Tensor:
    """left [tokens, r], x [tokens, in] -> left^T x [r, in], in float32 (float64 for float64)."""
    return _wide(left.t() @ x)


def adapter_gradients(
    dy: Tensor,
    up: Tensor,
    u: Tensor,
    y: Tensor | None,
    gain: Tensor | None,
    safe: Tensor | None,
    scaling: float,
    dots: Callable = column_dots,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over dy [tokens, out] that a layer's backward pass wants, with up [out, r] = diag(gain) s B, u [tokens,
    r] = x At:

    v [tokens, r] = dy up    dB [out, r] = diag(s gain) dyt u    dm [out] = sum_t dy y / safe, empty without y
    """
    dB = _wide(dy.t() @ u)
    dB *= scaling if gain is None else (scaling * gain).unsqueeze(1)
    return dy @ up, dB, dB.new_empty(0) if y is None else dots(dy, y) / safe


def nf4_gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """x [columns] -> W x [rows], of a weight that is never rounded: decoded, multiplied and summed in float32 (float64
    for such x).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    W = dequantize_nf4(
        packed, absmax, nested_absmax, nested_offset, None, rows, columns, blocksize, nested_blocksize, wide
    )
    return W @ x.to(wide)


def row_norms(chunks: Iterable[tuple[slice, Tensor]], A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """n [out] with n_j = ||W_j + s B_j A||, from W as (rows, W[rows]) in the dtype of A:

        n_j^2 = ||W_j||^2 + 2 s sum_k (W At)_jk B_jk + s^2 sum_k (B (A At))_jk B_jk

    Where the sums cancel (n^2 below 1e-3 ||W||^2) they have lost their digits, and those rows are computed densely. On
    a GPU all are, as to ask which would be a wait for every chunk.
    """
    gram = A @ A.t()
    n = torch.empty(B.shape[0], dtype=A.dtype, device=A.device)
    for part, W in chunks:
        b = B[part]
        if W.is_cuda:
            n[part] = torch.linalg.vector_norm(torch.addmm(W, b, A, alpha=scaling), dim=1)
            continue
        own = torch.linalg.vector_norm(W, dim=1).square_()
        squared = own + 2 * scaling * ((W @ A.t()) * b).sum(1) + scaling**2 * ((b @ gram) * b).sum(1)
        if (
            not squared.is_meta and (lost := (squared < 1e-3 * own).nonzero().squeeze(1)).numel()
        ):  # without numbers none is lost
            squared[lost] = (W[lost] + scaling * (b[lost] @ A)).square().sum(1)
        n[part] = squared.sqrt()
    return n


def row_norms_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """`row_norms` of an NF4 weight [rows, columns]: A [r, columns], B [rows, r] float32 or float64 -> n [rows] in that
    dtype.
    """
    scales = decode_absmax(absmax, nested_absmax, nested_offset, nested_blocksize)

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        step = max(1, CHUNK_ELEMENTS // columns)
        for row in range(0, rows, step):
            part = slice(row, min(row + step, rows))
            start, stop = part.start * columns, part.stop * columns
            before = start % blocksize
            values = _decode(packed.view(-1), scales, start - before, stop, blocksize)[before:]
            yield part, values.view(-1, columns).to(A.dtype)

    return row_norms(chunks(), A, B, scaling)


def row_norms_nf4_all(
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    nested_offset: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    columns: Sequence[int],
    blocksizes: Sequence[int],
    nested_blocksize: int,
    norms: Callable = row_norms_nf4,
) -> list[Tensor]:
    """`row_norms_nf4`, or `norms`, of each layer; the constants of double quantization are empty lists where there are
    none.
    """
    constants = zip(nested_absmax, nested_offset, strict=True) if nested_absmax else [(None, None)] * len(packed)
    layers = zip(packed, absmax, constants, A, B, scaling, rows, columns, blocksizes, strict=True)
    return [norms(codes, scales, *c, *layer, nested_blocksize) for codes, scales, c, *layer in layers]


def nf4_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    row_gain: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    transposed: bool,
) -> Tensor:
    """x [tokens, columns] -> x W't [tokens, rows], W' = diag(row_gain) W; not transposed: x [tokens, rows] -> x W'
    [tokens, columns].
    """
    weight = dequantize_nf4(
        packed, absmax, nested_absmax, nested_offset, row_gain, rows, columns, blocksize, nested_blocksize, x.dtype
    )
    return x @ (weight.t() if transposed else weight)


def adapted_product(
    x: Tensor,
    x_adapter: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor | None,
    n: Tensor | None,
    base: Tensor | None,
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
) -> tuple[Tensor, ...]:
    """An adapted layer forward: x [tokens, in], x_adapter (x, or x after dropout), A [r, in], B [out, r], m and n [out]
    or None

        -> y [tokens, out] = x W't + u upt,  u [tokens, r] = x_adapter downt,  `fold_factors`' down and up, with W' = diag(gain) W,
           and its gain and safe m, and n as one [3, out], [0, out] without m

    n is the `row_norms` where m is given without it. A kernel may make it from base [out], the norms of W alone.
    """
    constants = (packed, absmax, nested_absmax, nested_offset)
    if m is not None and n is None:
        n = row_norms_nf4(*constants, A, B, scaling, rows, columns, blocksize, nested_blocksize)
    down, up, gain, safe = fold_factors(A, B, m, n, scaling, x.dtype)
    weight = dequantize_nf4(
        *constants, None if m is None else gain, rows, columns, blocksize, nested_blocksize, x.dtype
    )
    u = x_adapter @ down.t()
    factors = B.new_empty(0, rows) if m is None else torch.stack((gain, safe, n))
    return torch.addmm(u @ up.t(), x, weight.t()), u, down, up, factors


def adapted_product_backward(
    dy: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    u: Tensor,
    y: Tensor | None,
    factors: Tensor,
    scaling: float,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    needs_x: bool,
) -> tuple[Tensor, ...]:
    """(dx = dy W' + v down or empty, dA = vt x, dB, dm) with v, dB and dm of `adapter_gradients`; dm is empty without
    y.
    """
    gain, safe = factors[:2] if len(factors) else (None, None)
    v, dB, dm = adapter_gradients(dy, up, u, y, gain, safe, scaling)
    dx = dy.new_empty(0)
    if needs_x:
        weight = dequantize_nf4(
            packed, absmax, nested_absmax, nested_offset, gain, rows, columns, blocksize, nested_blocksize, dy.dtype
        )
        dx = torch.addmm(v @ down, dy, weight)
    return dx, token_product(v, x), dB, dm


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, vocabulary], targets [n] int64 -> losses [n] = log(sum_k e^(l_k)) - l_target, in float32 (float64 for
    float64).

    The logits become d losses / d logits = softmax - onehot(target), rounded to their dtype.
    """
    count_write(logits)
    wide, at = _wide(logits), targets.unsqueeze(1)
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
    wide = _wide(x)
    inverse = 1 / (wide.square().mean(1) + eps).sqrt()
    return weight * (wide * inverse.unsqueeze(1)).to(x.dtype), inverse


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """dx [rows, n] = (g - x^ mean(g x^)) / rms with x^ = x / rms and g = weight * dy; the weight is frozen."""
    g, inverse = _wide(dy * weight), inverse.unsqueeze(1)
    normal = _wide(x) * inverse
    return ((g - normal * (g * normal).mean(1, keepdim=True)) * inverse).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of one shape, silu(x) = x / (1 + e^-x) rounded to the dtype first. arXiv:2002.05202."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up): dy up s (1 + gate (1 - s)) with s = sigmoid(gate), and dy silu(gate)."""
    return torch.ops.aten.silu_backward(dy * up, gate), dy * torch.nn.functional.silu(gate)


def swiglu_backward_dots(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_backward` of matrices [tokens, n], and [2, n]: the `column_dots` of d gate with gate and of d up with up."""
    dgate, dup = swiglu_backward(dy, gate, up)
    return dgate, dup, torch.stack((column_dots(dgate, gate), column_dots(dup, up)))


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


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T of one example in float32, [heads, queries, keys], minus infinity where a key is later than the
    query.
    """
    scores = torch.einsum("qhd,khd->hqk", _wide(q), _wide(k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention within each example: q [tokens, heads, D], k, v [tokens, groups, D], example i in rows bounds[i]
    to bounds[i + 1].

    -> out [tokens, heads, D] = softmax(scale q k^T) v, and lse [heads, tokens] = log(sum e^(scale q k^T)) in float32.
    Heads h of equal h // (heads / groups) share a key and a value.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for start, stop in pairwise(bounds):
        part = slice(start, stop)
        scores = _scores(q[part], k[part], scale)
        lse[:, part] = scores.logsumexp(2)
        out[part] = torch.einsum(
            "hqk,khd->qhd", scores.softmax(2), _wide(v[part].repeat_interleave(q.shape[1] // k.shape[1], dim=1))
        )
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) with P = e^(scale q k^T - lse) and dS = P (dout v^T - sum(dout out)): dq = scale dS k, dk = scale
    dS^T q, dv = P^T dout.

    dk and dv are summed over the heads that share a key. arXiv:2205.14135, appendix B.
    """
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    for start, stop in pairwise(bounds):
        part = slice(start, stop)
        P = (_scores(q[part], k[part], scale) - lse[:, part].unsqueeze(2)).exp()
        do, keys, values = _wide(dout[part]), *(_wide(x[part].repeat_interleave(shared, dim=1)) for x in (k, v))
        delta = (do * _wide(out[part])).sum(2).t().unsqueeze(2)
        dS = P * (torch.einsum("qhd,khd->hqk", do, values) - delta) * scale
        gradients[0][part] = torch.einsum("hqk,khd->qhd", dS, keys)
        for gradient, weights, x in ((gradients[1], dS, _wide(q[part])), (gradients[2], P, do)):
            gradient[part] = torch.einsum("hqk,qhd->khd", weights, x).unflatten(1, (-1, shared)).sum(2)
    return gradients
