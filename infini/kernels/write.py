"""The `linear` write of whole segments as a custom operator, with its gradient.

Keys are read twice in training (forward and backward), values too; features are never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.outer import sum_outer
from infini.kernels.parts import (
    add_rows,
    as_bytes,
    at,
    features,
    last_axis_contiguous,
    load_matrix,
    load_scale,
    load_tile,
    looked_up,
    normalized,
    store_tile,
    through_norm,
    tokens_of,
    true_below,
    whole,
)
from infini.kernels.scan import scan
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory


@torch.library.custom_op("infini::write_linear", mutates_args=())
def write_linear(
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor,
    normalizer: Tensor,
    offset: int,
    written: int,
    slots: int,
    segment_length: int,
    eps: float,
    bounds: Tensor | None = None,
    fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write segment after segment, equation (4) of arXiv:2404.07143: `memory.write_segments`.

    Args:
        k, v: `[b, tokens, g, d]` in fp32, bf16 or fp16, last axis contiguous.
        strength: w, fp32 `[b, tokens, g]`; None: 1.
        scale, bias: `[g, d]`, for keys divided by their root mean square; None: keys as they are.
        matrix, normalizer: the memory before, fp32 `[b, g, d, d]` and `[b, g, d]`.
        offset: token at which segment 0 begins.
        written: full segments.
        slots: memories to give, `written` or one more (of the open segment at the end).
        segment_length: tokens of a segment.
        eps: of the root mean square.
        bounds: of rows that differ, int32 `[b, slots, 2]`: first token of each segment and the one behind its last, the same for a
            segment that is not written. `offset` says nothing then, and `written` is `slots`.
        fresh: bool `[b, slots]`, True where a document begins and the memory is emptied first; None: nowhere.

    Returns:
        M `[b, slots, g, d, d]` and z `[b, slots, g, d]` before each segment, M and z after the last written one.
    """
    k, v = last_axis_contiguous(k), last_axis_contiguous(v)
    strength, fresh = None if strength is None else strength.contiguous(), as_bytes(fresh)
    matrices, normalizers = sum_outer(
        k, v, strength, None, scale, bias, k.shape[2], offset, written, slots, segment_length, eps, bounds=bounds
    )
    before, after = scan(matrices, matrix, written, in_place=True, fresh=fresh)
    z_before, z_after = scan(normalizers, normalizer, written, in_place=True, fresh=fresh)
    return before, z_before, after, z_after


@write_linear.register_fake
def _(k, v, strength, scale, bias, matrix, normalizer, offset, written, slots, segment_length, eps, bounds=None, fresh=None):
    batch, _, groups, dim = k.shape
    return (
        matrix.new_empty(batch, slots, groups, dim, dim),
        matrix.new_empty(batch, slots, groups, dim),
        matrix.new_empty(batch, groups, dim, dim),
        matrix.new_empty(batch, groups, dim),
    )


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots"])
def write_backward_kernel(
    k, v, strength, new_part, scale, bias, bounds, d_matrices, d_normalizers, dk, dv, d_strength, d_scale, d_bias,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head,
    length, offset, segments, slots, parts, segment_length, groups, eps,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, TURNED: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, PARTLY: tl.constexpr, ADD: tl.constexpr, RAGGED: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment of one memory. dv = f dM; the gradient of f = w sigma is e = v dM^T + dz, that of w sigma.e.

    PARTLY: only the share `new_part` of f is in z, and e = v dM^T + c dz.
    ADD: `dk` and `d_strength` hold a gradient of the features and of the strengths, which is added.
    """
    program = tl.program_id(0)
    group, part, segment = program % groups, program // groups % parts, program // groups // parts % segments
    b = (program // groups // parts // segments).to(tl.int64)
    rows, columns = tl.arange(0, BT), tl.arange(0, BD)
    inside = true_below(columns, D, D == BD)
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    memory = (b * slots + segment) * groups + group
    dz = tl.load(d_normalizers + memory * D + columns, mask=inside, other=0.0)
    key_scale, key_bias = load_scale(scale, bias, group, columns, inside, D, NORM)
    scale_sum, bias_sum = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    if BV == BD:
        high, low = load_matrix(d_matrices + memory * D * D, columns, columns, inside, inside, D, EXACT)
    for start in tl.range(first, last, BT, num_stages=AHEAD):
        valid = true_below(rows, last - start, WHOLE)
        x = load_tile(at(k, b, k_batch, start, k_token, group, k_head), k_token, rows, columns, valid, inside)
        normal, inverse = normalized(x, eps, D, NORM)
        sigma, slope = features(normal, key_scale, key_bias, valid, NORM)
        dk_at = at(dk, b, dk_batch, start, dk_token, group, dk_head)
        place = (b * length + start + rows) * groups + group
        w = tl.full([BT], 1.0, tl.float32)
        if WEIGHTED:
            w = tl.load(strength + place, mask=valid, other=0.0)
        d_sigma = tl.zeros([BT, BD], tl.float32) + dz[None, :]
        if PARTLY:
            d_sigma *= tl.load(new_part + place, mask=valid, other=0.0)[:, None]
        for block in tl.range(0, BD // BV, num_stages=1):
            wide = block * BV + tl.arange(0, BV)
            inside_wide = true_below(wide, D, D == BD)
            if BV < BD:
                high, low = load_matrix(d_matrices + memory * D * D, columns, wide, inside, inside_wide, D, EXACT)
            y = load_tile(at(v, b, v_batch, start, v_token, group, v_head), v_token, rows, wide, valid, inside_wide)
            read = looked_up(sigma, high, low, BT, BV, TURNED, EXACT)
            dv_at = at(dv, b, dk_batch, start, dk_token, group, dk_head)
            store_tile(dv_at, dk_token, rows, wide, valid, inside_wide, w[:, None] * read)
            d_sigma += looked_up(y, tl.trans(high), tl.trans(low), BT, BD, TURNED, EXACT)
        if WEIGHTED:
            dw = tl.sum(sigma * d_sigma, axis=1)
            d_sigma *= w[:, None]
        if ADD:
            d_sigma += load_tile(dk_at, dk_token, rows, columns, valid, inside)
        if WEIGHTED:
            if ADD:
                dw += tl.load(d_strength + place, mask=valid, other=0.0)
            tl.store(d_strength + place, dw, mask=valid)
        dx = d_sigma * slope
        if NORM:
            scale_sum = add_rows(scale_sum, dx * normal, BT, ROWS, BD)
            bias_sum = add_rows(bias_sum, dx, BT, ROWS, BD)
        dx = through_norm(dx, normal, inverse, key_scale, D, NORM)
        store_tile(dk_at, dk_token, rows, columns, valid, inside, dx)
    if NORM:
        tl.store(d_scale + program.to(tl.int64) * D + columns, tl.sum(scale_sum, axis=0), mask=inside)
        tl.store(d_bias + program.to(tl.int64) * D + columns, tl.sum(bias_sum, axis=0), mask=inside)


@torch.library.custom_op("infini::write_linear_backward", mutates_args=())
def write_linear_backward(
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    d_before: Tensor,
    dz_before: Tensor,
    d_after: Tensor,
    dz_after: Tensor,
    offset: int,
    written: int,
    segment_length: int,
    eps: float,
    bounds: Tensor | None = None,
    fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, strength, scale, bias, matrix and normalizer; empty where there was None."""
    k, v = last_axis_contiguous(k), last_axis_contiguous(v)
    strength, fresh = None if strength is None else strength.contiguous(), as_bytes(fresh)
    # An addition is in every memory behind its segment.
    d_matrices, d_matrix = scan(d_before.contiguous(), d_after, d_before.shape[1], reverse=True, fresh=fresh)
    d_normalizers, d_normalizer = scan(dz_before.contiguous(), dz_after, d_before.shape[1], reverse=True, fresh=fresh)
    dk, dv, d_strength = new_gradients(k, v, strength, written * segment_length, bounds)
    d_scale, d_bias = backward_of_sums(
        k, v, strength, scale, bias, d_matrices, d_normalizers, dk, dv, d_strength, offset, written, segment_length, eps,
        bounds=bounds,
    )  # fmt: skip
    return dk, dv, d_strength, d_scale, d_bias, d_matrix, d_normalizer


def new_gradients(
    k: Tensor, v: Tensor, strength: Tensor | None, covered: int, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of k, v and strengths. What is not written has no gradient, and no program."""
    new = torch.empty if covered == k.shape[1] and bounds is None else torch.zeros
    dk, dv = (new(k.shape, dtype=x.dtype, device=k.device) for x in (k, v))
    return dk, dv, new(k.shape[:3] if strength is not None else 0, dtype=torch.float32, device=k.device)


def backward_of_sums(
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    d_matrices: Tensor,
    d_normalizers: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_strength: Tensor,
    offset: int,
    written: int,
    segment_length: int,
    eps: float,
    add: bool = False,
    tiles: Tiles | None = None,
    bounds: Tensor | None = None,
    new_part: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """From the gradients of every segment's sums to dk, dv and d_strength, which are filled, and those of scale and bias.

    Args:
        d_matrices, d_normalizers: fp32 `[b, slots, g, d, d]` and `[b, slots, g, d]`.
        add: dk and d_strength hold gradients of features and strengths, which are added.
        tiles: None: those of the table.
        bounds: as of `write_linear`.
        new_part: fp32 `[b, tokens, g]`, the share of each key that z grew by; None: all of it.
    """
    batch, length, groups, dim = k.shape
    exact, norm = is_exact(k, v), scale is not None
    tiles = (tiles or Tiles.of("write_backward", dim, segment_length, exact, shared_memory(k.device))).within(segment_length)
    parts, part = tiles.parts(segment_length)
    sums = (batch, written, parts, groups, dim) if norm else (0,)
    d_scale, d_bias = (torch.empty(sums, dtype=torch.float32, device=k.device) for _ in range(2))
    with on_device_of(k):
        write_backward_kernel[(batch * written * parts * groups,)](
            k, v, strength if strength is not None else k, k if new_part is None else new_part, scale if norm else k,
            bias if norm else k, k if bounds is None else bounds, d_matrices, d_normalizers, dk, dv, d_strength, d_scale, d_bias,
            *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3],
            length, offset, written, d_matrices.shape[1], parts, segment_length, groups, eps,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=part, ROWS=tiles.rows, AHEAD=tiles.loop_stages,
            TURNED=tiles.turned, NORM=norm, WEIGHTED=strength is not None, PARTLY=new_part is not None, ADD=add, RAGGED=bounds is not None,
            WHOLE=whole(length, offset, written, segment_length, part, tiles, bounds), EXACT=exact, **tiles.options,
        )  # fmt: skip
    if norm:
        d_scale, d_bias = d_scale.sum(dim=(0, 1, 2)).to(scale.dtype), d_bias.sum(dim=(0, 1, 2)).to(bias.dtype)
    return d_scale, d_bias


@write_linear_backward.register_fake
def _(k, v, strength, scale, bias, d_before, dz_before, d_after, dz_after, offset, written, segment_length, eps, bounds=None, fresh=None):
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
    k, v, strength, scale, bias, _, _, ctx.offset, ctx.written, _, ctx.segment_length, ctx.eps, bounds, fresh = inputs
    ctx.save_for_backward(k, v, strength, scale, bias, bounds, fresh)


def _backward(ctx, d_before, dz_before, d_after, dz_after):
    k, v, strength, scale, bias, bounds, fresh = ctx.saved_tensors
    dk, dv, d_strength, d_scale, d_bias, d_matrix, d_normalizer = write_linear_backward(
        k, v, strength, scale, bias, d_before, dz_before, d_after, dz_after,
        ctx.offset, ctx.written, ctx.segment_length, ctx.eps, bounds, fresh,
    )  # fmt: skip
    return (
        dk,
        dv,
        None if strength is None else d_strength,
        None if scale is None else d_scale,
        None if bias is None else d_bias,
        d_matrix,
        d_normalizer,
        *[None] * 7,
    )


write_linear.register_autograd(_backward, setup_context=_save)
