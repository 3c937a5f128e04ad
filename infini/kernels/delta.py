"""The `delta` and `gamma_delta` writes of whole segments as a custom operator, with its gradient.

A segment's change is M - G M + B with B = sum w s v^T and the symmetric G = sum a s s^T, where s = sigma(k), a = w / (s.z) and z
are the sums of keys before the segment. So keys and values are read for B and the sums, the sums are scanned, keys are read
again for G, and the maps are scanned. G and B leave no trace: the gradient makes G anew from the keys. `gamma_delta` differs in z
alone, see `gamma`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.gamma import grow
from infini.kernels.outer import added_up, pieces_of, sum_outer
from infini.kernels.parts import (
    add_rows,
    as_bytes,
    at,
    features,
    filled,
    last_axis_contiguous,
    load_matrix,
    load_scale,
    load_tile,
    looked_up,
    normalized,
    product,
    reciprocal,
    rounded,
    store_tile,
    tokens_of,
    true_below,
    whole,
)
from infini.kernels.scan import affine_scan, scan
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory
from infini.kernels.write import backward_of_sums, new_gradients


@triton.jit
def load_has(has_memory, place, MASKED: tl.constexpr):
    """1.0 where the memory holds something; where it does not, nothing is looked up in it."""
    has = 1.0
    if MASKED:
        has = tl.load(has_memory + place).to(tl.float32)
    return has


@triton.jit
def load_strength(strength, place, valid, BT: tl.constexpr, WEIGHTED: tl.constexpr):
    """w `[BT]`; 1 without a write gate."""
    if WEIGHTED:
        return tl.load(strength + place, mask=valid, other=0.0)
    return tl.full([BT], 1.0, tl.float32)


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots", "pieces"])
def gram_kernel(
    k, strength, scale, bias, normalizers, has_memory, bounds, grams,
    k_batch, k_token, k_head, length, offset, segments, slots, pieces, segment_length, groups, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    AHEAD: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a piece of one segment, one memory, BV columns of G."""
    program, wide_block = tl.program_id(0), tl.program_id(1)
    group, piece, segment = program % groups, program // groups % pieces, program // groups // pieces % segments
    b = (program // groups // pieces // segments).to(tl.int64)
    rows, columns, wide = tl.arange(0, BT), tl.arange(0, BD), wide_block * BV + tl.arange(0, BV)
    inside, inside_wide = true_below(columns, D, D == BD), true_below(wide, D, D == BD)
    first, last = tokens_of(
        segment, piece, segment_length, segment_length // pieces, offset, length, bounds, b * segments + segment, RAGGED
    )
    has = load_has(has_memory, b * slots + segment, MASKED)
    readable = filled(inside, has_memory, b * slots + segment, MASKED)
    z = tl.load(normalizers + ((b * slots + segment) * groups + group) * D + columns, mask=readable, other=0.0)
    key_scale, key_bias = load_scale(scale, bias, group, columns, inside, D, NORM)
    wide_scale, wide_bias = load_scale(scale, bias, group, wide, inside_wide, D, NORM)
    gram = tl.zeros([BD, BV], tl.float32)
    for start in tl.range(first, last, BT, num_stages=AHEAD):
        valid = true_below(rows, last - start, WHOLE)
        keys = at(k, b, k_batch, start, k_token, group, k_head)
        x = load_tile(keys, k_token, rows, columns, valid, inside)
        normal, inverse = normalized(x, eps, D, NORM)
        sigma, _slope = features(normal, key_scale, key_bias, valid, NORM)
        w = load_strength(strength, (b * length + start + rows) * groups + group, valid, BT, WEIGHTED)
        a = has * w * reciprocal(tl.maximum(tl.sum(rounded(sigma, EXACT) * z[None, :], axis=1), floor))
        if BV < BD:
            wide_normal = load_tile(keys, k_token, rows, wide, valid, inside_wide)
            if NORM:
                wide_normal = wide_normal.to(tl.float32) * inverse[:, None]
            wide_sigma, _wide_slope = features(wide_normal.to(tl.float32), wide_scale, wide_bias, valid, NORM)
            gram = product(tl.trans(a[:, None] * sigma), wide_sigma, gram, EXACT)
        else:
            gram = product(tl.trans(a[:, None] * sigma), sigma, gram, EXACT)
    memory = ((b * segments + segment) * pieces + piece) * groups + group
    place = grams + memory * D * D + columns[:, None] * D + wide[None, :]
    tl.store(place, gram, mask=inside[:, None] & inside_wide[None, :])


def gram_sums(
    k: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    normalizers: Tensor,
    has_memory: Tensor | None,
    offset: int,
    written: int,
    segment_length: int,
    eps: float,
    floor: float,
    tiles: Tiles | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """G of every written segment, fp32 `[b, written, g, d, d]`; the arguments are those of `write_delta`, z before each segment."""
    batch, length, groups, dim = k.shape
    pieces = pieces_of(batch * written * groups, segment_length)
    grams = torch.empty(batch, written * pieces, groups, dim, dim, dtype=torch.float32, device=k.device)
    exact, norm = is_exact(k), scale is not None
    tiles = (tiles or Tiles.of("gram", dim, segment_length, exact, shared_memory(k.device))).within(segment_length // pieces)
    with on_device_of(k):
        gram_kernel[(batch * written * pieces * groups, tiles.wide_blocks)](
            k, k if strength is None else strength, scale if norm else k, bias if norm else k, normalizers,
            k if has_memory is None else has_memory, k if bounds is None else bounds, grams,
            *k.stride()[:3], length, offset, written, normalizers.shape[1], pieces, segment_length, groups, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, AHEAD=tiles.loop_stages, NORM=norm, WEIGHTED=strength is not None,
            MASKED=has_memory is not None, RAGGED=bounds is not None,
            WHOLE=whole(length, offset, written, segment_length, segment_length // pieces, tiles, bounds), EXACT=exact, **tiles.options,
        )  # fmt: skip
    return grams if pieces == 1 else added_up(grams, pieces, written)


@torch.library.custom_op("infini::write_delta", mutates_args=())
def write_delta(
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor,
    normalizer: Tensor,
    has_memory: Tensor | None,
    offset: int,
    written: int,
    slots: int,
    segment_length: int,
    eps: float,
    floor: float,
    bounds: Tensor | None = None,
    fresh: Tensor | None = None,
    gamma: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write segment after segment, equation (5) of arXiv:2404.07143: `memory.write_segments`.

    Args:
        k, v, strength, scale, bias, matrix, normalizer, offset, written, slots, segment_length, eps, bounds, fresh: as of
            `write_linear`.
        has_memory: bool `[b, slots]`, whether anything was written before a segment; None: everywhere.
        floor: smallest denominator sigma(k).z.
        gamma: the rule is `gamma_delta`.

    Returns:
        M `[b, slots, g, d, d]` and z `[b, slots, g, d]` before each segment, M and z after the last written one; of `gamma_delta`
        the share of each key with which z grows, `[b, tokens, g]`, which has no gradient, otherwise nothing.
    """
    k, v = last_axis_contiguous(k), last_axis_contiguous(v)
    strength, has_memory, fresh = None if strength is None else strength.contiguous(), as_bytes(has_memory), as_bytes(fresh)
    matrices, normalizers = sum_outer(
        k, v, strength, None, scale, bias, k.shape[2], offset, written, slots, segment_length, eps, bounds=bounds
    )
    if gamma:
        z_before, z_after, new_part = grow(
            k, strength, scale, bias, normalizer, offset, written, slots, segment_length, eps, bounds, fresh
        )
    else:
        z_before, z_after = scan(normalizers, normalizer, written, in_place=True, fresh=fresh)
        new_part = normalizer.new_empty(0)
    grams = gram_sums(k, strength, scale, bias, z_before, has_memory, offset, written, segment_length, eps, floor, bounds=bounds)
    before, after = affine_scan(matrices, grams, matrix, written, in_place=True, fresh=fresh)
    return before, z_before, after, z_after, new_part


@write_delta.register_fake
def _(
    k, v, strength, scale, bias, matrix, normalizer, has_memory,
    offset, written, slots, segment_length, eps, floor, bounds=None, fresh=None, gamma=False,
):  # fmt: skip
    batch, length, groups, dim = k.shape
    return (
        matrix.new_empty(batch, slots, groups, dim, dim),
        matrix.new_empty(batch, slots, groups, dim),
        matrix.new_empty(batch, groups, dim, dim),
        matrix.new_empty(batch, groups, dim),
        matrix.new_empty((batch, length, groups) if gamma else 0),
    )


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots"])
def gram_backward_kernel(
    k, strength, scale, bias, normalizers, has_memory, bounds, d_matrices, dk, d_strength, d_normalizers,
    k_batch, k_token, k_head, dk_batch, dk_token, dk_head,
    length, offset, segments, slots, parts, segment_length, groups, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, TURNED: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment of one memory.

    `d_matrices` is H = dG + dG^T. The gradient of a is s.H s / 2, that of s is a H s and, through s.z, c z with
    c = -a da / (s.z); c s is left behind for the gradient of z.
    """
    program = tl.program_id(0)
    group, part, segment = program % groups, program // groups % parts, program // groups // parts % segments
    b = (program // groups // parts // segments).to(tl.int64)
    rows, columns = tl.arange(0, BT), tl.arange(0, BD)
    inside = true_below(columns, D, D == BD)
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    readable = filled(inside, has_memory, b * slots + segment, MASKED)
    z = tl.load(normalizers + ((b * slots + segment) * groups + group) * D + columns, mask=readable, other=0.0)
    memory = (b * segments + segment) * groups + group
    key_scale, key_bias = load_scale(scale, bias, group, columns, inside, D, NORM)
    z_sum = tl.zeros([ROWS, BD], tl.float32)
    if BV == BD:
        high, low = load_matrix(d_matrices + memory * D * D, columns, columns, readable, inside, D, EXACT)
    for start in tl.range(first, last, BT, num_stages=AHEAD):
        valid = true_below(rows, last - start, WHOLE)
        keys = at(k, b, k_batch, start, k_token, group, k_head)
        x = load_tile(keys, k_token, rows, columns, valid, inside)
        normal, inverse = normalized(x, eps, D, NORM)
        sigma, _slope = features(normal, key_scale, key_bias, valid, NORM)
        place = (b * length + start + rows) * groups + group
        w = load_strength(strength, place, valid, BT, WEIGHTED)
        denominator = tl.sum(rounded(sigma, EXACT) * z[None, :], axis=1)
        held = denominator >= floor
        inverse_d = reciprocal(tl.maximum(denominator, floor))
        if BV == BD:
            e = looked_up(sigma, high, low, BT, BD, TURNED, EXACT)
        else:
            e = tl.zeros([BT, BD], tl.float32)
            for block in tl.range(0, BD // BV, num_stages=1):
                wide = block * BV + tl.arange(0, BV)
                inside_wide = wide < D
                wide_scale, wide_bias = load_scale(scale, bias, group, wide, inside_wide, D, NORM)
                high, low = load_matrix(d_matrices + memory * D * D, columns, wide, readable, inside_wide, D, EXACT)
                wide_normal = load_tile(keys, k_token, rows, wide, valid, inside_wide)
                if NORM:
                    wide_normal = wide_normal.to(tl.float32) * inverse[:, None]
                # H is symmetric: these rows of it are those columns.
                wide_sigma, _wide_slope = features(wide_normal.to(tl.float32), wide_scale, wide_bias, valid, NORM)
                e += looked_up(wide_sigma, tl.trans(high), tl.trans(low), BT, BD, TURNED, EXACT)
        da = 0.5 * tl.sum(sigma * e, axis=1) * inverse_d
        a = w * inverse_d
        c = tl.where(held, -a * da, 0.0)
        if WEIGHTED:
            tl.store(d_strength + place, da, mask=valid)
        d_sigma = a[:, None] * e + c[:, None] * z[None, :]
        store_tile(at(dk, b, dk_batch, start, dk_token, group, dk_head), dk_token, rows, columns, valid, inside, d_sigma)
        z_sum = add_rows(z_sum, c[:, None] * sigma, BT, ROWS, BD)
    tl.store(d_normalizers + program.to(tl.int64) * D + columns, tl.sum(z_sum, axis=0), mask=inside)


def backward_of_grams(
    k, strength, scale, bias, z_before, has_memory, d_grams, dk, d_strength,
    offset, written, segment_length, eps, floor, exact: bool, tiles: Tiles | None = None, bounds: Tensor | None = None,
):  # fmt: skip
    """From H of every segment's G to the gradients of features and strengths, which fill `dk` and `d_strength`; gives those of z
    in parts `[b, written, parts, g, d]`."""
    batch, length, groups, dim = k.shape
    norm = scale is not None
    tiles = (tiles or Tiles.of("gram_backward", dim, segment_length, exact, shared_memory(k.device))).within(segment_length)
    parts, part = tiles.parts(segment_length)
    z_sums = torch.empty(batch, written, parts, groups, dim, dtype=torch.float32, device=k.device)
    with on_device_of(k):
        gram_backward_kernel[(batch * written * parts * groups,)](
            k, k if strength is None else strength, scale if norm else k, bias if norm else k, z_before,
            k if has_memory is None else has_memory, k if bounds is None else bounds, d_grams, dk, d_strength, z_sums,
            *k.stride()[:3], *dk.stride()[:3], length, offset, written, z_before.shape[1], parts, segment_length, groups, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=part, ROWS=tiles.rows, AHEAD=tiles.loop_stages,
            TURNED=tiles.turned, NORM=norm, WEIGHTED=strength is not None, MASKED=has_memory is not None,
            RAGGED=bounds is not None, WHOLE=whole(length, offset, written, segment_length, part, tiles, bounds),
            EXACT=exact, **tiles.options,
        )  # fmt: skip
    return z_sums


@torch.library.custom_op("infini::write_delta_backward", mutates_args=())
def write_delta_backward(
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    has_memory: Tensor | None,
    new_part: Tensor | None,
    before: Tensor,
    z_before: Tensor,
    d_before: Tensor,
    dz_before: Tensor,
    d_after: Tensor,
    dz_after: Tensor,
    offset: int,
    written: int,
    segment_length: int,
    eps: float,
    floor: float,
    bounds: Tensor | None = None,
    fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, strength, scale, bias, matrix and normalizer; empty where there was None."""
    k, v = last_axis_contiguous(k), last_axis_contiguous(v)
    strength, has_memory, fresh = None if strength is None else strength.contiguous(), as_bytes(has_memory), as_bytes(fresh)
    before, z_before, slots = before.contiguous(), z_before.contiguous(), before.shape[1]
    grams = gram_sums(k, strength, scale, bias, z_before, has_memory, offset, written, segment_length, eps, floor, bounds=bounds)
    # L behind each segment, the gradient of its sums; then dG = -L M^T.
    d_matrices, d_matrix = affine_scan(d_before.contiguous(), grams, d_after, slots, reverse=True, fresh=fresh)
    with torch.autocast(k.device.type, enabled=False):  # which a backward pass may be called under
        d_grams = d_matrices[:, :written] @ before[:, :written].transpose(-1, -2)
    d_grams = -(d_grams + d_grams.transpose(-1, -2))
    dk, dv, d_strength = new_gradients(k, v, strength, written * segment_length, bounds)
    z_sums = backward_of_grams(
        k, strength, scale, bias, z_before, has_memory, d_grams, dk, d_strength, offset, written, segment_length, eps, floor, is_exact(k, v),
        bounds=bounds,
    )  # fmt: skip
    d_normalizers = dz_before.clone(memory_format=torch.contiguous_format)
    d_normalizers[:, :written] += z_sums.sum(dim=2)
    d_normalizers, d_normalizer = scan(d_normalizers, dz_after, slots, in_place=True, reverse=True, fresh=fresh)
    d_scale, d_bias = backward_of_sums(
        k, v, strength, scale, bias, d_matrices, d_normalizers, dk, dv, d_strength, offset, written, segment_length, eps,
        add=True, bounds=bounds, new_part=new_part,
    )  # fmt: skip
    return dk, dv, d_strength, d_scale, d_bias, d_matrix, d_normalizer


@write_delta_backward.register_fake
def _(
    k, v, strength, scale, bias, has_memory, new_part, before, z_before, d_before, dz_before, d_after, dz_after,
    offset, written, segment_length, eps, floor, bounds=None, fresh=None,
):  # fmt: skip
    none = d_after.new_empty(0)
    return (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        none if strength is None else d_after.new_empty(k.shape[:3]),
        d_after.new_empty(0) if scale is None else scale.new_empty(scale.shape),
        d_after.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        d_after.new_empty(d_after.shape),
        dz_after.new_empty(dz_after.shape),
    )


def _save(ctx, inputs, output):
    *given, ctx.offset, ctx.written, _, ctx.segment_length, ctx.eps, ctx.floor, bounds, fresh, gamma = inputs
    k, v, strength, scale, bias, _, _, has_memory = given
    before, z_before, _, _, new_part = output
    ctx.mark_non_differentiable(new_part)
    ctx.save_for_backward(k, v, strength, scale, bias, has_memory, new_part if gamma else None, before, z_before, bounds, fresh)


def _backward(ctx, d_before, dz_before, d_after, dz_after, _):
    *saved, bounds, fresh = ctx.saved_tensors
    dk, dv, d_strength, d_scale, d_bias, d_matrix, d_normalizer = write_delta_backward(
        *saved, d_before, dz_before, d_after, dz_after, ctx.offset, ctx.written, ctx.segment_length, ctx.eps, ctx.floor, bounds, fresh
    )
    return (
        dk,
        dv,
        None if saved[2] is None else d_strength,
        None if saved[3] is None else d_scale,
        None if saved[4] is None else d_bias,
        d_matrix,
        d_normalizer,
        *[None] * 10,
    )


write_delta.register_autograd(_backward, setup_context=_save)
