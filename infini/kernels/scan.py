"""Scans over segments: prefix sums, and affine maps. The memory before each segment, and the one after the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.tiles import MUCH_SHARED, on_device_of, processors, shared_memory

BLOCK = 256

# Columns of a memory that one program of the affine scan takes through all segments: at least and at most.
FEWEST, MOST, WARPS = 8, 64, 8


@triton.jit
def emptied(x, fresh, place, FRESH: tl.constexpr):
    """x, or 0 where a document begins: chosen and not multiplied, because what is dropped may be infinite."""
    if FRESH:
        x = tl.where(tl.load(fresh + place) > 0, 0.0, x)
    return x


@triton.jit(do_not_specialize=["segments", "filled"])
def scan_kernel(
    additions, fresh, before, first, last, segments, filled, columns, REVERSE: tl.constexpr, FRESH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK numbers of one row's memories, through all segments."""
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(first + b * columns + column, mask=inside, other=0.0)
    for i in tl.range(0, segments, num_stages=4):
        segment = segments - 1 - i if REVERSE else i
        at = (b * segments + segment) * columns + column
        y = tl.load(additions + at, mask=inside & (segment < filled), other=0.0)
        if not REVERSE:
            x = emptied(x, fresh, b * segments + segment, FRESH)
        tl.store(before + at, x, mask=inside)
        x += y
        if REVERSE:
            x = emptied(x, fresh, b * segments + segment, FRESH)
    tl.store(last + b * columns + column, x, mask=inside)


def scan(
    additions: Tensor, first: Tensor, filled: int, in_place: bool = False, reverse: bool = False, fresh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_s = x_{s-1} + addition_s over axis 1: every x_{s-1}, and the last x.

    Args:
        additions: fp32 `[b, segments, ...]`, contiguous; from segment `filled` on nothing is added.
        first: fp32 `[b, ...]`, the x before segment 0 (before the last one if `reverse`).
        in_place: the result takes the place of `additions`.
        reverse: from the last segment to the first, as the gradient goes.
        fresh: uint8 `[b, segments]`, x is 0 before these segments, whatever came before; None: nowhere.
    """
    batch, segments = additions.shape[:2]
    columns = first[0].numel()
    first = first.contiguous()
    before, last = additions if in_place else torch.empty_like(additions), torch.empty_like(first)
    grid = (triton.cdiv(columns, BLOCK), batch)
    with on_device_of(additions):
        scan_kernel[grid](
            additions, additions if fresh is None else fresh, before, first, last, segments, filled, columns,
            REVERSE=reverse, FRESH=fresh is not None, BLOCK=BLOCK, num_warps=2,
        )  # fmt: skip
    return before, last


@triton.jit
def halves(x):
    """x rounded to the 11 bits that a TF32 product sees, and the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def map_product(gram, x, BD: tl.constexpr, BV: tl.constexpr):
    """gram x to the precision of fp32, as `product` in three parts, but with fewer instructions: without its care for infinite numbers."""
    gram_high, gram_low = halves(gram)
    x_high, x_low = halves(x)
    total = tl.dot(gram_low, x_high, tl.zeros([BD, BV], tl.float32), input_precision="tf32")
    total = tl.dot(gram_high, x_low, total, input_precision="tf32")
    return tl.dot(gram_high, x_high, total, input_precision="tf32")


@triton.jit(do_not_specialize=["segments", "filled", "mapped"])
def affine_kernel(
    additions, grams, fresh, before, first, last, segments, filled, mapped,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, FRESH: tl.constexpr, TRANSPOSED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one memory, through all segments. The maps mix rows alone, so columns know nothing of each other."""
    memory, groups = tl.program_id(0), tl.num_programs(0)
    b = tl.program_id(2).to(tl.int64)
    rows, wide = tl.arange(0, BD), tl.program_id(1) * BV + tl.arange(0, BV)
    inside = (rows < D)[:, None] & (wide < D)[None, :]
    square = (rows < D)[:, None] & (rows < D)[None, :]
    place = rows[:, None] * D + wide[None, :]
    turned = rows[None, :] * D + rows[:, None] if TRANSPOSED else rows[:, None] * D + rows[None, :]
    x = tl.load(first + (b * groups + memory) * D * D + place, mask=inside, other=0.0)
    for i in tl.range(0, segments, num_stages=STAGES):
        segment = segments - 1 - i if REVERSE else i
        at = ((b * segments + segment) * groups + memory) * D * D
        of_map = ((b * mapped + segment) * groups + memory) * D * D
        y = tl.load(additions + at + place, mask=inside & (segment < filled), other=0.0)
        gram = tl.load(grams + of_map + turned, mask=square & (segment < mapped), other=0.0)
        if not REVERSE:
            x = emptied(x, fresh, b * segments + segment, FRESH)
        tl.store(before + at + place, x, mask=inside)
        # A memory is a sum of thousands of pairs: fp32 whatever the inputs are.
        x = x + y - map_product(gram, x, BD, BV)
        if REVERSE:
            x = emptied(x, fresh, b * segments + segment, FRESH)
    tl.store(last + (b * groups + memory) * D * D + place, x, mask=inside)


def affine_scan(
    additions: Tensor,
    grams: Tensor,
    first: Tensor,
    filled: int,
    in_place: bool = False,
    reverse: bool = False,
    transposed: bool = False,
    fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x_s = (I - G_s) x_{s-1} + addition_s over axis 1: every x_{s-1}, and the last x.

    Args:
        additions: fp32 `[b, segments, g, d, d]`, contiguous; from segment `filled` on nothing is added.
        grams: G, fp32 `[b, mapped, g, d, d]`, contiguous; 0 from segment `mapped` on.
        first, in_place, reverse, fresh: as in `scan`.
        transposed: by G_s^T, as the gradient goes.
    """
    batch, segments, groups, dim = additions.shape[:4]
    first = first.contiguous()
    before, last = additions if in_place else torch.empty_like(additions), torch.empty_like(first)
    wide = max(16, triton.next_power_of_2(dim))
    block = columns_of(batch * groups, wide, additions.device)
    stages = stages_of(wide, block, shared_memory(additions.device))
    with on_device_of(additions):
        affine_kernel[(groups, triton.cdiv(dim, block), batch)](
            additions, grams, additions if fresh is None else fresh, before, first, last, segments, filled, grams.shape[1],
            D=dim, BD=wide, BV=block, REVERSE=reverse, FRESH=fresh is not None, TRANSPOSED=transposed, STAGES=stages, num_warps=WARPS,
        )  # fmt: skip
    return before, last


def columns_of(memories: int, wide: int, device: torch.device) -> int:
    """The most columns for a program that leave a program for every processor: each reads all maps of its memory."""
    block = most_columns(wide, shared_memory(device))
    while block > FEWEST and memories * (wide // block) < 0.9 * processors(device):
        block //= 2
    return block


def stages_of(wide: int, block: int, shared: int) -> int:
    """How many segments are under way at a time: a step waits for nothing but the one before where the maps of two more fit."""
    ahead = 4 * wide * (wide + block)
    return next((stages for stages in (3, 2) if (stages - 1) * ahead + 8 * wide * block <= shared), 1)


def most_columns(wide: int, shared: int) -> int:
    """Of heads padded to `wide` numbers, on a GPU whose programs may have `shared` bytes."""
    return min(wide, MOST if shared >= MUCH_SHARED else 16)
