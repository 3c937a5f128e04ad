"""What the kernels share. Names: x and y `[BT, BD]` or `[BT, BV]`, tiles of BT tokens; D numbers of a head, padded to BD."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.tiles import Tiles

# Triton's interpreter has no bf16 products: there the operands are rounded to bf16 and multiplied in fp32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)


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
    if INTERPRETED:
        return x.to(tl.bfloat16).to(tl.float32)
    # Two numbers by one conversion: compiled from the line above it would be one for each, by the unit that has exponentials to do.
    return tl.inline_asm_elementwise(
        "{.reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000;}",
        "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def add_rows(sums, x, BT: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """sums + x `[BT, BD]` folded to ROWS rows: one thread's own numbers are added, no others; `tl.sum` at the end does the rest."""
    return sums + tl.sum(tl.reshape(x, [BT // ROWS, ROWS, BD]), axis=0)


@triton.jit
def true_below(numbers, end, ALL: tl.constexpr):
    """Which of the numbers are below `end`. ALL: it is known that all are; the compiler sees it and masks nothing."""
    if ALL:
        return numbers == numbers
    return numbers < end


@triton.jit
def at(pointer, b, stride_batch, token, stride_token, head, stride_head):
    """Where a token's head begins."""
    return pointer + b * stride_batch + tl.full([], token, tl.int64) * stride_token + head * stride_head


@triton.jit
def load_tile(pointer, stride_token, tokens, columns, valid, inside):
    """Rows of one head, 0 outside."""
    places = pointer + tokens.to(tl.int64)[:, None] * stride_token + columns[None, :]
    return tl.load(places, mask=valid[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_tile(pointer, stride_token, tokens, columns, valid, inside, x):
    """The inverse of `load_tile`, in the dtype of the pointer."""
    places = pointer + tokens.to(tl.int64)[:, None] * stride_token + columns[None, :]
    tl.store(places, x.to(pointer.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def reciprocal(x):
    """1 / x for normal x, without the branches of a division that is right in its last bit."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


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
    """sigma(x) = ELU(x) + 1 and its derivative, exp(min(x, 0)); both 0 for what is no token.

    Columns that pad a head have feature 1; memories are 0 there, and nothing of them is stored.
    """
    x = normal
    if NORM:
        x = normal * scale[None, :] + bias[None, :]
    slope = tl.exp2(tl.minimum(x * LOG2_E, 0.0))
    return tl.where(valid[:, None], slope + tl.maximum(x, 0.0), 0.0), tl.where(valid[:, None], slope, 0.0)


@triton.jit
def through_norm(gradient, normal, inverse, scale, D: tl.constexpr, NORM: tl.constexpr):
    """The gradient of x, given that of normal * scale + bias."""
    if NORM:
        gradient = gradient * scale[None, :]
        gradient = inverse[:, None] * (gradient - normal * (tl.sum(gradient * normal, axis=1) / D)[:, None])
    return gradient


@triton.jit
def filled(inside, has_memory, place, MASKED: tl.constexpr):
    """The columns of a memory to load: none where nothing was written, because what lies there need not be finite."""
    if MASKED:
        inside = inside & (tl.load(has_memory + place) > 0)
    return inside


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


def whole(length: int, offset: int, segments: int, segment_length: int, part: int, tiles: Tiles, bounds: Tensor | None) -> bool:
    """Whether all tiles of all parts are full of tokens, so that a kernel need not ask which tokens there are."""
    cut = segment_length % part or part % tiles.BT
    return bounds is None and offset == 0 and length >= segments * segment_length and not cut
