"""What the kernels share. Names: x and y `[BT, BD]` or `[BT, BV]`, tiles of BT tokens; D numbers of a head, padded to BD."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter has no bf16 products: there the operands are rounded to bf16 and multiplied in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, total, EXACT: tl.constexpr):
    """total + a b with fp32 sums: three TF32 products to fp32's precision if EXACT, otherwise of operands rounded to bf16."""
    if EXACT:
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total, input_precision="tf32x3")
    if INTERPRETED:
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), total)
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)


@triton.jit
def rounded(x, EXACT: tl.constexpr):
    """x in fp32 as `product` sees it."""
    if EXACT:
        return x
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def add_rows(sums, x, BT: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """sums + x `[BT, BD]` folded to ROWS rows: one thread's own numbers are added, no others; `tl.sum` at the end does the rest."""
    return sums + tl.sum(tl.reshape(x, [BT // ROWS, ROWS, BD]), axis=0)


@triton.jit
def load_tile(pointer, stride_token, tokens, columns, valid, inside):
    """Rows of one head, 0 outside."""
    at = pointer + tokens.to(tl.int64)[:, None] * stride_token + columns[None, :]
    return tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_tile(pointer, stride_token, tokens, columns, valid, inside, x):
    """The inverse of `load_tile`, in the dtype of the pointer."""
    at = pointer + tokens.to(tl.int64)[:, None] * stride_token + columns[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def load_scale(scale, bias, head, columns, inside, D: tl.constexpr, NORM: tl.constexpr):
    """Scale and bias of a head's memory queries or keys `[BD]`."""
    if NORM:
        return (
            tl.load(scale + head * D + columns, mask=inside, other=0.0).to(tl.float32),
            tl.load(bias + head * D + columns, mask=inside, other=0.0).to(tl.float32),
        )
    return tl.zeros_like(columns).to(tl.float32), tl.zeros_like(columns).to(tl.float32)


@triton.jit
def normalized(x, eps, D: tl.constexpr, NORM: tl.constexpr):
    """x / rms(x) and 1 / rms(x); x and nothing without NORM."""
    x = x.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        return x * inverse[:, None], inverse
    return x, tl.sum(x, axis=1)


@triton.jit
def features(normal, scale, bias, valid, NORM: tl.constexpr):
    """sigma(x) = ELU(x) + 1, and 0 for what is no token; its derivative is min(sigma(x), 1).

    Columns that pad a head have feature 1; memories are 0 there, and nothing of them is stored.
    """
    x = normal
    if NORM:
        x = normal * scale[None, :] + bias[None, :]
    f = tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)
    return tl.where(valid[:, None], f, 0.0)


@triton.jit
def through_norm(gradient, normal, inverse, scale, D: tl.constexpr, NORM: tl.constexpr):
    """The gradient of x, given that of normal * scale + bias."""
    if NORM:
        gradient = gradient * scale[None, :]
        gradient = inverse[:, None] * (gradient - normal * (tl.sum(gradient * normal, axis=1) / D)[:, None])
    return gradient


@triton.jit
def load_matrix(pointer, columns, wide, inside, inside_wide, D: tl.constexpr, EXACT: tl.constexpr):
    """A block `[BD, BV]` of a memory as two matrices that `matrix_product` adds up.

    Rounded to bf16 once, a memory would lose what one pair adds to a sum of thousands; the rest after rounding keeps it.
    """
    whole = tl.load(
        pointer + columns[:, None] * D + wide[None, :], mask=inside[:, None] & inside_wide[None, :], other=0.0
    )
    if EXACT:
        high, low = whole, whole
    else:
        high = whole.to(tl.bfloat16)
        low = (whole - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def matrix_product(a, high, low, total, EXACT: tl.constexpr):
    """total + a (high + low)."""
    total = product(a, high, total, EXACT)
    if not EXACT:
        total = product(a, low, total, EXACT)
    return total


@triton.jit
def looked_up(a, high, low, BT: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr, EXACT: tl.constexpr):
    """a (high + low) `[BT, WIDE]`.

    TURNED: as the transpose of (high + low)^T a^T, in which the memory gives the product its rows. On Hopper products have 64
    rows for four warps at least: so tiles may have fewer tokens, and leave room for more programs.
    """
    if TURNED:
        return tl.trans(matrix_rows_product(high, low, a, tl.zeros([WIDE, BT], tl.float32), EXACT))
    return matrix_product(a, high, low, tl.zeros([BT, WIDE], tl.float32), EXACT)


@triton.jit
def matrix_rows_product(high, low, a, total, EXACT: tl.constexpr):
    """total + (high + low)^T a^T."""
    total = product(tl.trans(high), tl.trans(a), total, EXACT)
    if not EXACT:
        total = product(tl.trans(low), tl.trans(a), total, EXACT)
    return total


@triton.jit
def load_fitted(pointer, columns, wide, inside, inside_wide, D: tl.constexpr):
    """A block `[BD, BV]` of a memory in fp16, divided by its largest entry, and that entry.

    Eleven bits of every entry that counts: rounded to the eight of bf16 a memory would lose what one pair adds to a sum of hundreds.
    """
    whole = tl.load(
        pointer + columns[:, None] * D + wide[None, :], mask=inside[:, None] & inside_wide[None, :], other=0.0
    )
    size = tl.maximum(tl.max(tl.max(tl.abs(whole), axis=1), axis=0), 1e-30)
    return (whole * (1.0 / size)).to(tl.float16), size


@triton.jit
def fitted(g):
    """Features `[BT, BD]` in fp16, each row divided by its largest, and that: no row leaves the range of fp16, large or small."""
    size = tl.maximum(tl.max(g, axis=1), 1e-30)
    return (g * (1.0 / size)[:, None]).to(tl.float16), size


@triton.jit
def looked_up_once(g, memory, BT: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr):
    """g memory `[BT, WIDE]` of two in fp16, with fp32 sums. TURNED: as in `looked_up`."""
    if INTERPRETED:
        return tl.dot(g.to(tl.float32), memory.to(tl.float32))
    if TURNED:
        return tl.trans(tl.dot(tl.trans(memory), tl.trans(g), tl.zeros([WIDE, BT], tl.float32)))
    return tl.dot(g, memory, tl.zeros([BT, WIDE], tl.float32))


@triton.jit
def tokens_of(segment, part, segment_length, part_length, offset, length, bounds, place, RAGGED: tl.constexpr):
    """First and last + 1 token of a part of a segment that begins at token `offset` + segment * segment_length.

    A segment may reach out of the `length` tokens on both sides. RAGGED: its tokens are those from `bounds[place, 0]` to
    `bounds[place, 1]`, wherever the other segments are.
    """
    if RAGGED:
        first = tl.load(bounds + 2 * place) + part * part_length
        return first, tl.minimum(first + part_length, tl.load(bounds + 2 * place + 1))
    start = segment * segment_length + offset
    first = tl.maximum(start + part * part_length, 0)
    last = tl.minimum(start + tl.minimum((part + 1) * part_length, segment_length), length)
    return first, last


def last_axis_contiguous(x: Tensor) -> Tensor:
    """As the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels load it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
