"""Sums over the tokens of each segment: M = sum a f y^T and z = sum c f, with f = sigma(x).

With a = c = w, keys and values it is the write, equation (4) of arXiv:2404.07143; with the weights that the backward pass of
the read leaves behind, queries and output gradients, it is the gradient of the memories that were read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.parts import add_rows, at, features, load_scale, load_tile, normalized, product, rounded, tokens_of, true_below, whole
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory

# Two for each processor of the largest GPUs; pieces of a segment of fewer tokens would write more sums than they read tokens.
ENOUGH_PROGRAMS, SMALLEST_PIECE = 264, 512


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots"])
def outer_kernel(
    x, y, weights, z_weights, scale, bias, bounds, matrices, normalizers,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    length, offset, segments, slots, pieces, segment_length, groups, eps,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SHARED_BY: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr, WEIGHTS: tl.constexpr, RAGGED: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a piece of one segment, one memory, BV columns. WEIGHTS: 0 none, 1 a = c, 2 both.

    Summed is M^T = sum y (a f)^T: y goes to the product as it was loaded, and no features are transposed on their way.
    """
    program, wide_block = tl.program_id(0), tl.program_id(1)
    group, piece, segment = program % groups, program // groups % pieces, program // groups // pieces % segments
    b = (program // groups // pieces // segments).to(tl.int64)
    rows, columns, wide = tl.arange(0, BT), tl.arange(0, BD), wide_block * BV + tl.arange(0, BV)
    inside, inside_wide = true_below(columns, D, D == BD), true_below(wide, D, D == BD)
    first, last = tokens_of(
        segment, piece, segment_length, segment_length // pieces, offset, length, bounds, b * segments + segment, RAGGED
    )
    matrix, normalizer = tl.zeros([BV, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    for member in range(SHARED_BY):
        head = group * SHARED_BY + member
        head_scale, head_bias = load_scale(scale, bias, head, columns, inside, D, NORM)
        for start in tl.range(first, last, BT, num_stages=AHEAD):
            valid = true_below(rows, last - start, WHOLE)
            x_tile = load_tile(at(x, b, x_batch, start, x_token, head, x_head), x_token, rows, columns, valid, inside)
            y_tile = load_tile(at(y, b, y_batch, start, y_token, head, y_head), y_token, rows, wide, valid, inside_wide)
            normal, inverse = normalized(x_tile, eps, D, NORM)
            f, _slope = features(normal, head_scale, head_bias, valid, NORM)
            place = (b * length + start + rows) * (groups * SHARED_BY) + head
            if WEIGHTS > 0:
                weighted = f * tl.load(weights + place, mask=valid, other=0.0)[:, None]
            else:
                weighted = f
            # M and z of a write must be sums of the same features: then rounding is a slightly other key, no more.
            if WEIGHTS == 2:
                z_weighted = f * tl.load(z_weights + place, mask=valid, other=0.0)[:, None]
            else:
                z_weighted = rounded(weighted, EXACT)
            normalizer = add_rows(normalizer, z_weighted, BT, ROWS, BD)
            matrix = product(tl.trans(y_tile), weighted, matrix, EXACT)
    memory = (b * slots + segment * pieces + piece) * groups + group
    place = matrices + memory * D * D + columns[None, :] * D + wide[:, None]
    tl.store(place, matrix, mask=inside[None, :] & inside_wide[:, None])
    if wide_block == 0:
        tl.store(normalizers + memory * D + columns, tl.sum(normalizer, axis=0), mask=inside)


def sum_outer(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z_weights: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: int,
    offset: int,
    segments: int,
    slots: int,
    segment_length: int,
    eps: float,
    tiles: Tiles | None = None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """M `[b, slots, groups, d, d]` and z `[b, slots, groups, d]` in fp32; the first `segments` of the slots are filled.

    Args:
        x, y: `[b, tokens, heads, d]`, last axis contiguous.
        weights, z_weights: a and c, fp32 `[b, tokens, heads]`, contiguous; c None: as a; both None: 1.
        scale, bias: of normalized x, `[heads, d]`; None: x as it is.
        groups: memories; head i belongs to memory i // (heads // groups).
        offset: token at which segment 0 begins, negative where its beginning lies before the tokens.
        tiles: None: those of the table.
        bounds: int32 `[b, segments, 2]`, the first token of each segment and the one behind its last; None: `offset` says it.
    """
    batch, length, heads, dim = x.shape
    pieces = pieces_of(batch * segments * groups, segment_length)
    piece_length, sums = segment_length // pieces, slots if pieces == 1 else segments * pieces
    exact = is_exact(x, y)
    tiles = (tiles or Tiles.of("outer", dim, piece_length, exact, shared_memory(x.device))).within(piece_length)
    matrices = torch.empty(batch, sums, groups, dim, dim, dtype=torch.float32, device=x.device)
    normalizers = torch.empty(batch, sums, groups, dim, dtype=torch.float32, device=x.device)
    norm = scale is not None
    with on_device_of(x):
        outer_kernel[(batch * segments * pieces * groups, tiles.wide_blocks)](
            x, y, weights if weights is not None else x, z_weights if z_weights is not None else x,
            scale if norm else x, bias if norm else x, x if bounds is None else bounds, matrices, normalizers,
            *x.stride()[:3], *y.stride()[:3],
            length, offset, segments, sums, pieces, segment_length, groups, eps,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, SHARED_BY=heads // groups, ROWS=tiles.rows, AHEAD=tiles.loop_stages,
            NORM=norm, WEIGHTS=(weights is not None) + (z_weights is not None), RAGGED=bounds is not None,
            WHOLE=whole(length, offset, segments, segment_length, piece_length, tiles, bounds), EXACT=exact, **tiles.options,
        )  # fmt: skip
    if pieces > 1:
        matrices, normalizers = added_up(matrices, pieces, slots), added_up(normalizers, pieces, slots)
    return matrices, normalizers


def pieces_of(programs: int, segment_length: int) -> int:
    """How many pieces a segment is cut into, so that few long segments keep all processors of a GPU busy."""
    pieces = 1
    while programs * pieces < ENOUGH_PROGRAMS and segment_length // pieces >= 2 * SMALLEST_PIECE and segment_length // pieces % 2 == 0:
        pieces *= 2
    return pieces


def added_up(sums: Tensor, pieces: int, slots: int) -> Tensor:
    """The sums of `pieces` neighbors each, in the first of `slots` places."""
    whole = sums.unflatten(1, (-1, pieces))
    result = sums.new_empty(sums.shape[0], slots, *sums.shape[2:])
    torch.sum(whole, dim=2, out=result[:, : whole.shape[1]])
    return result
