"""Exclusive prefix sums over segments: the memory before each segment, and the one after the last."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.tiles import on_device_of

BLOCK = 256


@triton.jit(do_not_specialize=["segments", "filled"])
def scan_kernel(additions, before, first, last, segments, filled, columns, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK numbers of one row's memories, through all segments."""
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(first + b * columns + column, mask=inside, other=0.0)
    for i in tl.range(0, segments, num_stages=4):
        segment = segments - 1 - i if REVERSE else i
        at = (b * segments + segment) * columns + column
        y = tl.load(additions + at, mask=inside & (segment < filled), other=0.0)
        tl.store(before + at, x, mask=inside)
        x += y
    tl.store(last + b * columns + column, x, mask=inside)


def scan(additions: Tensor, first: Tensor, filled: int, in_place: bool = False, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """x_s = x_{s-1} + addition_s over axis 1: every x_{s-1}, and the last x.

    Args:
        additions: fp32 `[b, segments, ...]`, contiguous; from segment `filled` on nothing is added.
        first: fp32 `[b, ...]`, the x before segment 0 (before the last one if `reverse`).
        in_place: the result takes the place of `additions`.
        reverse: from the last segment to the first, as the gradient goes.
    """
    batch, segments = additions.shape[:2]
    columns = first[0].numel()
    first = first.contiguous()
    before, last = additions if in_place else torch.empty_like(additions), torch.empty_like(first)
    grid = (triton.cdiv(columns, BLOCK), batch)
    with on_device_of(additions):
        scan_kernel[grid](additions, before, first, last, segments, filled, columns, REVERSE=reverse, BLOCK=BLOCK, num_warps=2)
    return before, last
