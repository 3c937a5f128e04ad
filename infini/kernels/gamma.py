"""The normalizer of `gamma_delta` (ARMT, arXiv:2407.04841), which grows by the new part of a key alone.

z + sum c f over the tokens of each segment, with f = w sigma(k) and c = clip(1 - z.f / |f|^2, 0, 1): 1 while z is 0.
That is not affine in z: one program takes a memory through all its segments. A token costs two sums over a head, no product of matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.parts import add_rows, at, features, load_scale, load_tile, normalized, rounded, tokens_of, true_below, whole
from infini.kernels.scan import emptied
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory


@triton.jit(do_not_specialize=["length", "offset", "written", "slots"])
def gamma_kernel(
    k, strength, scale, bias, fresh, bounds, first, before, last, new_part,
    k_batch, k_token, k_head, length, offset, written, slots, segment_length, groups, eps, smallest,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, FRESH: tl.constexpr, RAGGED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one memory, through all segments."""
    program = tl.program_id(0).to(tl.int64)
    group, b = program % groups, program // groups
    rows, columns = tl.arange(0, BT), tl.arange(0, BD)
    inside = true_below(columns, D, D == BD)
    key_scale, key_bias = load_scale(scale, bias, group, columns, inside, D, NORM)
    z = tl.load(first + program * D + columns, mask=inside, other=0.0)
    for segment in range(slots):
        place = b * slots + segment
        z = emptied(z, fresh, place, FRESH)
        tl.store(before + (place * groups + group) * D + columns, z, mask=inside)
        start_of, last_of = tokens_of(segment, 0, segment_length, segment_length, offset, length, bounds, place, RAGGED)
        last_of = tl.where(segment < written, last_of, start_of)
        grown = tl.zeros([ROWS, BD], tl.float32)
        for start in range(start_of, last_of, BT):
            valid = true_below(rows, last_of - start, WHOLE)
            x = load_tile(at(k, b, k_batch, start, k_token, group, k_head), k_token, rows, columns, valid, inside)
            normal, inverse = normalized(x, eps, D, NORM)
            f, _slope = features(normal, key_scale, key_bias, valid, NORM)
            token = (b * length + start + rows) * groups + group
            if WEIGHTED:
                f *= tl.load(strength + token, mask=valid, other=0.0)[:, None]
            # The features that M and z are sums of. Those of columns that pad a head are no one's.
            f = tl.where(inside[None, :], rounded(f, EXACT), 0.0)
            # 1 - z.f / |f|^2 by one sum: what is left of 1 keeps its digits, and an approximate division its relative error.
            c = tl.sum(f * (f - z[None, :]), axis=1) / tl.maximum(tl.sum(f * f, axis=1), smallest)
            c = tl.minimum(tl.maximum(c, 0.0), 1.0)
            tl.store(new_part + token, c, mask=valid)
            grown = add_rows(grown, c[:, None] * f, BT, ROWS, BD)
        z += tl.sum(grown, axis=0)
    tl.store(last + program * D + columns, z, mask=inside)


def grow(
    k: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    normalizer: Tensor,
    offset: int,
    written: int,
    slots: int,
    segment_length: int,
    eps: float,
    bounds: Tensor | None = None,
    fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """z before each segment, z after the last written one, and c of every token `[b, tokens, g]`, all in fp32.

    The arguments are those of `write_delta`; c of tokens in no written segment is 0.
    """
    batch, length, groups, dim = k.shape
    exact, norm = is_exact(k), scale is not None
    tiles = Tiles.of("outer", dim, segment_length, exact, shared_memory(k.device)).within(segment_length)
    before = torch.empty(batch, slots, groups, dim, dtype=torch.float32, device=k.device)
    last = torch.empty(batch, groups, dim, dtype=torch.float32, device=k.device)
    new_part = torch.zeros(batch, length, groups, dtype=torch.float32, device=k.device)
    with on_device_of(k):
        gamma_kernel[(batch * groups,)](
            k, k if strength is None else strength, scale if norm else k, bias if norm else k,
            k if fresh is None else fresh, k if bounds is None else bounds, normalizer.contiguous(), before, last, new_part,
            *k.stride()[:3], length, offset, written, slots, segment_length, groups, eps, torch.finfo(torch.float32).tiny,
            D=dim, BD=tiles.BD, BT=tiles.BT, ROWS=tiles.rows, NORM=norm, WEIGHTED=strength is not None,
            FRESH=fresh is not None, RAGGED=bounds is not None,
            WHOLE=slots == written and whole(length, offset, written, segment_length, segment_length, tiles, bounds),
            EXACT=exact, num_warps=tiles.warps,
        )  # fmt: skip
    return before, last, new_part
