"""Reading the memory and mixing it with the local output, as a custom operator with its gradient.

Queries and local output are read once and the mix is written once; what was read is never stored.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.outer import added_up, sum_outer
from infini.kernels.parts import (
    add_rows,
    as_bytes,
    features,
    fitted,
    last_axis_contiguous,
    load_fitted,
    load_matrix,
    load_scale,
    load_tile,
    looked_up,
    looked_up_once,
    normalized,
    product,
    rounded,
    store_tile,
    through_norm,
    tokens_of,
)
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory


@triton.jit
def shares(beta, has_memory, head, place, MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr):
    """sigmoid(beta), the shares of memory and local output, and 1 where the gate had a say."""
    weight = 1.0 / (1.0 + tl.exp(-tl.load(beta + head).to(tl.float32)))
    has = 1.0
    if MASKED:
        has = tl.load(has_memory + place).to(tl.float32)
    asked = 1.0 if MIX_EMPTY else has
    return weight, weight * has, 1.0 - weight * asked, asked


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def read_kernel(
    q, local, matrices, normalizers, beta, scale, bias, has_memory, bounds, mixed,
    q_batch, q_token, q_head, local_batch, local_token, local_head, mixed_batch, mixed_token, mixed_head,
    length, offset, segments, parts, segment_length, heads, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr,
    AHEAD: tl.constexpr, TURNED: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr,
    RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, one query head, BV columns."""
    program, wide_block = tl.program_id(0), tl.program_id(1)
    head, part, segment = program % heads, program // heads % parts, program // heads // parts % segments
    b = (program // heads // parts // segments).to(tl.int64)
    columns, wide = tl.arange(0, BD), wide_block * BV + tl.arange(0, BV)
    inside, inside_wide = columns < D, wide < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    memory = (b * segments + segment) * (heads // SHARED_BY) + head // SHARED_BY
    if EXACT:
        high, low = load_matrix(matrices + memory * D * D, columns, wide, inside, inside_wide, D, EXACT)
    else:
        high, size = load_fitted(matrices + memory * D * D, columns, wide, inside, inside_wide, D)
    z = tl.load(normalizers + memory * D + columns, mask=inside, other=0.0)
    weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
    query_scale, query_bias = load_scale(scale, bias, head, columns, inside, D, NORM)
    for start in tl.range(first, last, BT, num_stages=AHEAD):
        tokens = start + tl.arange(0, BT)
        valid = tokens < last
        x = load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside)
        near = load_tile(local + b * local_batch + head * local_head, local_token, tokens, wide, valid, inside_wide)
        normal, inverse = normalized(x, eps, D, NORM)
        g = features(normal, query_scale, query_bias, valid, NORM)
        if EXACT:
            norm = 1.0 / tl.maximum(tl.sum(g * z[None, :], axis=1), floor)
            found = looked_up(g, high, low, BT, BV, TURNED, EXACT)
        else:
            seen, most = fitted(g)
            norm = size * most / tl.maximum(tl.sum(seen.to(tl.float32) * z[None, :], axis=1) * most, floor)
            found = looked_up_once(seen, high, BT, BV, TURNED)
        # Where the memory is empty its share is 0, but what was read need not be finite.
        far = tl.where(share > 0, found * norm[:, None], 0.0)
        out = share * far + local_share * near
        store_tile(mixed + b * mixed_batch + head * mixed_head, mixed_token, tokens, wide, valid, inside_wide, out)


@torch.library.custom_op("infini::read_and_mix", mutates_args=())
def read_and_mix(
    q: Tensor,
    local_output: Tensor,
    matrices: Tensor,
    normalizers: Tensor,
    beta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    has_memory: Tensor | None,
    offset: int,
    segment_length: int,
    mix_empty: bool,
    eps: float,
    floor: float,
    bounds: Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """Equations (3) and (6) of arXiv:2404.07143 for every query: `memory.retrieve` and `memory.mix`.

    Args:
        q: `[b, tokens, h, d]` in fp32, bf16 or fp16, last axis contiguous.
        local_output: the same shape.
        matrices, normalizers: the memory before each segment, fp32 `[b, segments, g, d, d]` and `[b, segments, g, d]`.
        beta: gate logits `[h]`.
        scale, bias: `[h, d]`, for queries divided by their root mean square; None: queries as they are.
        has_memory: bool `[b, segments]`, whether anything was written; None: everywhere.
        offset: token at which segment 0 begins; negative in an open segment.
        segment_length: tokens of a segment.
        mix_empty: an empty memory reads 0 and is mixed in; otherwise the local output is left whole.
        eps: of the root mean square.
        floor: smallest denominator sigma(q).z.
        bounds: of rows that differ, int32 `[b, segments, 2]`: first query of each segment and the one behind its last. `offset`
            says nothing then.
        padded: some queries are in no segment; their mix is 0.

    Returns:
        `[b, tokens, h, d]` in the dtype of `local_output`.
    """
    return mixed_by(
        q, local_output, matrices, normalizers, beta, scale, bias, has_memory, offset, segment_length, mix_empty, eps, floor,
        bounds=bounds, padded=padded,
    )  # fmt: skip


@read_and_mix.register_fake
def _(
    q, local_output, matrices, normalizers, beta, scale, bias, has_memory,
    offset, segment_length, mix_empty, eps, floor, bounds=None, padded=False,
):  # fmt: skip
    return local_output.new_empty(q.shape)


def room_for(padded: bool) -> Callable[..., Tensor]:
    """What makes a result of which padding is no program's business: finite there, or numbers that stand in no sum would spoil sums."""
    return torch.zeros if padded else torch.empty


def mixed_by(
    q, local_output, matrices, normalizers, beta, scale, bias, has_memory,
    offset, segment_length, mix_empty, eps, floor, tiles: Tiles | None = None, bounds: Tensor | None = None, padded: bool = False,
):  # fmt: skip
    """`read_and_mix` with other tiles than the table's."""
    batch, length, heads, dim = q.shape
    q, local_output = last_axis_contiguous(q), last_axis_contiguous(local_output)
    matrices, normalizers, has_memory = matrices.contiguous(), normalizers.contiguous(), as_bytes(has_memory)
    mixed = room_for(padded)(q.shape, dtype=local_output.dtype, device=q.device)
    segments, groups = matrices.shape[1:3]
    exact, norm = is_exact(q, local_output), scale is not None
    tiles = (tiles or Tiles.of("read", dim, segment_length, exact, shared_memory(q.device))).within(segment_length)
    parts, part = tiles.parts(segment_length)
    with on_device_of(q):
        read_kernel[(batch * segments * parts * heads, tiles.wide_blocks)](
            q, local_output, matrices, normalizers, beta, scale if norm else q, bias if norm else q,
            q if has_memory is None else has_memory, q if bounds is None else bounds, mixed,
            *q.stride()[:3], *local_output.stride()[:3], *mixed.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=part, SHARED_BY=heads // groups, AHEAD=tiles.loop_stages,
            TURNED=tiles.turned, NORM=norm, MASKED=has_memory is not None, MIX_EMPTY=mix_empty,
            RAGGED=bounds is not None, EXACT=exact, **tiles.options,
        )  # fmt: skip
    return mixed


@triton.jit
def through_block(
    d_mixed, local, d_local, d_token, local_token, dq_token, high, low, wide, tokens, valid, inside_wide, local_share, from_local, e,
    BT: tl.constexpr, BD: tl.constexpr, TURNED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds what some columns of the mix's gradient say of the local output and of e; passes on the local output's share."""
    dy = load_tile(d_mixed, d_token, tokens, wide, valid, inside_wide)
    e += looked_up(dy, tl.trans(high), tl.trans(low), BT, BD, TURNED, EXACT)
    near = load_tile(local, local_token, tokens, wide, valid, inside_wide)
    passed = dy.to(tl.float32)
    from_local += tl.sum(near.to(tl.float32) * passed, axis=1)
    store_tile(d_local, dq_token, tokens, wide, valid, inside_wide, local_share * passed)
    return dy, from_local, e


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def read_backward_kernel(
    q, local, d_mixed, matrices, normalizers, beta, scale, bias, has_memory, bounds,
    dq, d_local, weights, z_weights, d_matrices, d_normalizers, d_beta, d_scale, d_bias,
    q_batch, q_token, q_head, local_batch, local_token, local_head, d_batch, d_token, d_head, dq_batch, dq_token, dq_head,
    length, offset, segments, parts, segment_length, heads, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, FUSED: tl.constexpr, TURNED: tl.constexpr,
    NORM: tl.constexpr, MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, HEADS query heads of one memory.

    With g = sigma(q), d = g.z, the mix is p g M / d + l local. Let e = M dmix: the gradient of g is a e + c z with a = p / d and
    c = -p (g.e) / d^2, so that nothing is read again from M. The memory's gradient is dM = sum a g dmix^T, dz = sum c g: summed
    here for the part if FUSED, otherwise a and c are left behind.
    """
    program, units = tl.program_id(0), heads // HEADS
    unit, part, segment = program % units, program // units % parts, program // units // parts % segments
    b = (program // units // parts // segments).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    memory = (b * segments + segment) * (heads // SHARED_BY) + unit * HEADS // SHARED_BY
    z = tl.load(normalizers + memory * D + columns, mask=inside, other=0.0)
    if BV == BD:
        high, low = load_matrix(matrices + memory * D * D, columns, columns, inside, inside, D, EXACT)
    if FUSED:
        d_matrix, d_normalizer = tl.zeros([BV, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    for member in range(HEADS):
        head = unit * HEADS + member
        weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
        readable = share > 0
        query_scale, query_bias = load_scale(scale, bias, head, columns, inside, D, NORM)
        scale_sum, bias_sum = tl.zeros([ROWS, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
        beta_sum = tl.zeros([BT], tl.float32)
        for start in tl.range(first, last, BT, num_stages=AHEAD):
            tokens = start + tl.arange(0, BT)
            valid = tokens < last
            x = load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside)
            normal, inverse = normalized(x, eps, D, NORM)
            g = features(normal, query_scale, query_bias, valid, NORM)
            seen = rounded(g, EXACT)
            denominator = tl.sum(seen * z[None, :], axis=1)
            held = denominator >= floor
            denominator = tl.maximum(denominator, floor)
            from_local = tl.zeros([BT], tl.float32)
            e = tl.zeros([BT, BD], tl.float32)
            d_at, near_at = d_mixed + b * d_batch + head * d_head, local + b * local_batch + head * local_head
            d_local_at = d_local + b * dq_batch + head * dq_head
            if BV == BD:
                dy, from_local, e = through_block(
                    d_at, near_at, d_local_at, d_token, local_token, dq_token, high, low, columns, tokens, valid, inside,
                    local_share, from_local, e, BT, BD, TURNED, EXACT,
                )  # fmt: skip
            else:
                for block in tl.range(0, BD // BV, num_stages=1):  # unrolled, all of the memory would be in registers
                    wide = block * BV + tl.arange(0, BV)
                    inside_wide = wide < D
                    high, low = load_matrix(matrices + memory * D * D, columns, wide, inside, inside_wide, D, EXACT)
                    dy, from_local, e = through_block(
                        d_at, near_at, d_local_at, d_token, local_token, dq_token, high, low, wide, tokens, valid, inside_wide,
                        local_share, from_local, e, BT, BD, TURNED, EXACT,
                    )  # fmt: skip
            # Where the memory is empty nothing of it may pass, finite or not.
            from_memory = tl.where(readable, tl.sum(seen * e, axis=1) / denominator, 0.0)
            a = share / denominator
            c = tl.where(held, -a * from_memory, 0.0)
            if FUSED:
                d_matrix = product(tl.trans(dy), a[:, None] * g, d_matrix, EXACT)
                d_normalizer = add_rows(d_normalizer, c[:, None] * g, BT, ROWS, BD)
            else:
                place = (b * length + tokens) * heads + head
                tl.store(weights + place, a, mask=valid)
                tl.store(z_weights + place, c, mask=valid)
            beta_sum += from_memory - from_local
            dx = tl.where(readable, a[:, None] * e + c[:, None] * z[None, :], 0.0) * tl.minimum(g, 1.0)
            if NORM:
                scale_sum = add_rows(scale_sum, dx * normal, BT, ROWS, BD)
                bias_sum = add_rows(bias_sum, dx, BT, ROWS, BD)
            dx = through_norm(dx, normal, inverse, query_scale, D, NORM)
            store_tile(dq + b * dq_batch + head * dq_head, dq_token, tokens, columns, valid, inside, dx)
        at = ((b * segments + segment) * parts + part) * heads + head
        tl.store(d_beta + at, asked * weight * (1.0 - weight) * tl.sum(beta_sum, axis=0))
        if NORM:
            tl.store(d_scale + at * D + columns, tl.sum(scale_sum, axis=0), mask=inside)
            tl.store(d_bias + at * D + columns, tl.sum(bias_sum, axis=0), mask=inside)
    if FUSED:
        here = program.to(tl.int64)
        at = d_matrices + here * D * D + columns[None, :] * D + columns[:, None]
        tl.store(at, d_matrix, mask=inside[None, :] & inside[:, None])
        tl.store(d_normalizers + here * D + columns, tl.sum(d_normalizer, axis=0), mask=inside)


@torch.library.custom_op("infini::read_and_mix_backward", mutates_args=())
def read_and_mix_backward(
    d_mixed: Tensor,
    q: Tensor,
    local_output: Tensor,
    matrices: Tensor,
    normalizers: Tensor,
    beta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    has_memory: Tensor | None,
    offset: int,
    segment_length: int,
    mix_empty: bool,
    eps: float,
    floor: float,
    bounds: Tensor | None = None,
    padded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, local_output, matrices, normalizers, beta, scale and bias; empty where there was None."""
    return gradients_by(
        d_mixed, q, local_output, matrices, normalizers, beta, scale, bias, has_memory, offset, segment_length, mix_empty, eps, floor,
        bounds=bounds, padded=padded,
    )  # fmt: skip


def gradients_by(
    d_mixed, q, local_output, matrices, normalizers, beta, scale, bias, has_memory,
    offset, segment_length, mix_empty, eps, floor, tiles: Tiles | None = None, bounds: Tensor | None = None, padded: bool = False,
):  # fmt: skip
    """`read_and_mix_backward` with other tiles than the table's."""
    batch, length, heads, dim = q.shape
    d_mixed, q, local_output = (last_axis_contiguous(x) for x in (d_mixed, q, local_output))
    matrices, normalizers, has_memory = matrices.contiguous(), normalizers.contiguous(), as_bytes(has_memory)
    segments, groups = matrices.shape[1:3]
    exact, norm = is_exact(q, local_output, d_mixed), scale is not None
    tiles = (tiles or Tiles.of("read_backward", dim, segment_length, exact, shared_memory(q.device))).within(segment_length)
    parts, part = tiles.parts(segment_length)
    dq, d_local = (room_for(padded)(q.shape, dtype=x.dtype, device=q.device) for x in (q, local_output))

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    sums = (batch, segments * parts, heads)
    d_beta, (d_scale, d_bias) = fp32(*sums), (fp32(*sums, dim) if norm else fp32(0) for _ in range(2))
    nothing, fused, together = fp32(0), tiles.fused, heads // groups if tiles.fused else 1
    weights, z_weights = (nothing, nothing) if fused else (fp32(*q.shape[:3]), fp32(*q.shape[:3]))
    d_matrices, d_normalizers = nothing, nothing
    if fused:
        d_matrices = fp32(batch, segments * parts, groups, dim, dim)
        d_normalizers = fp32(batch, segments * parts, groups, dim)
    with on_device_of(q):
        read_backward_kernel[(batch * segments * parts * (heads // together),)](
            q, local_output, d_mixed, matrices, normalizers, beta, scale if norm else q, bias if norm else q,
            q if has_memory is None else has_memory, q if bounds is None else bounds,
            dq, d_local, weights, z_weights, d_matrices, d_normalizers, d_beta, d_scale, d_bias,
            *q.stride()[:3], *local_output.stride()[:3], *d_mixed.stride()[:3], *dq.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=part, SHARED_BY=heads // groups,
            HEADS=together, ROWS=tiles.rows, AHEAD=tiles.loop_stages, FUSED=fused,
            TURNED=tiles.turned, NORM=norm, MASKED=has_memory is not None, MIX_EMPTY=mix_empty,
            RAGGED=bounds is not None, EXACT=exact, **tiles.options,
        )  # fmt: skip
    if not fused:
        d_matrices, d_normalizers = sum_outer(
            q, d_mixed, weights, z_weights, scale, bias, groups, offset, segments, segments, segment_length, eps, bounds=bounds
        )
    elif parts > 1:
        d_matrices, d_normalizers = added_up(d_matrices, parts, segments), added_up(d_normalizers, parts, segments)
    d_beta = d_beta.sum(dim=(0, 1)).to(beta.dtype)
    if norm:
        d_scale, d_bias = d_scale.sum(dim=(0, 1)).to(scale.dtype), d_bias.sum(dim=(0, 1)).to(bias.dtype)
    return dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias


@read_and_mix_backward.register_fake
def _(
    d_mixed, q, local_output, matrices, normalizers, beta, scale, bias, has_memory,
    offset, segment_length, mix_empty, eps, floor, bounds=None, padded=False,
):  # fmt: skip
    return (
        q.new_empty(q.shape),
        local_output.new_empty(q.shape),
        matrices.new_empty(matrices.shape),
        normalizers.new_empty(normalizers.shape),
        beta.new_empty(beta.shape),
        matrices.new_empty(0) if scale is None else scale.new_empty(scale.shape),
        matrices.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, ctx.floor, bounds, ctx.padded = inputs
    ctx.save_for_backward(*tensors, bounds)


def _backward(ctx, d_mixed):
    *saved, bounds = ctx.saved_tensors
    dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias = read_and_mix_backward(
        d_mixed, *saved, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, ctx.floor, bounds, ctx.padded
    )
    if saved[5] is None:
        d_scale = d_bias = None
    return dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias, *[None] * 8


read_and_mix.register_autograd(_backward, setup_context=_save)
