"""Reading the memory and mixing it with the local output, as a custom operator with its gradient.

Queries and local output are read once and the mix is written once; what was read is never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.outer import sum_outer
from infini.kernels.parts import (
    features,
    load_matrix,
    load_scale,
    load_tile,
    matrix_product,
    normalized,
    rounded,
    store_tile,
    through_norm,
    tokens_of,
)
from infini.kernels.tiles import PART, Tiles, is_exact, on_device_of, parts_of, shared_memory


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
    q, local, matrices, normalizers, beta, scale, bias, has_memory, mixed,
    q_batch, q_token, q_head, local_batch, local_token, local_head, mixed_batch, mixed_token, mixed_head,
    length, offset, segments, parts, segment_length, heads, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr,
    NORM: tl.constexpr, MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, one query head, BV columns."""
    program, wide_block = tl.program_id(0), tl.program_id(1)
    head, part, segment = program % heads, program // heads % parts, program // heads // parts % segments
    b = (program // heads // parts // segments).to(tl.int64)
    columns, wide = tl.arange(0, BD), wide_block * BV + tl.arange(0, BV)
    inside, inside_wide = columns < D, wide < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length)
    memory = (b * segments + segment) * (heads // SHARED_BY) + head // SHARED_BY
    high, low = load_matrix(matrices + memory * D * D, columns, wide, inside, inside_wide, D, EXACT)
    z = tl.load(normalizers + memory * D + columns, mask=inside, other=0.0)
    weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
    query_scale, query_bias = load_scale(scale, bias, head, columns, inside, D, NORM)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        valid = tokens < last
        x = load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside)
        near = load_tile(local + b * local_batch + head * local_head, local_token, tokens, wide, valid, inside_wide)
        normal, inverse = normalized(x, eps, D, NORM)
        g = features(normal, query_scale, query_bias, valid, NORM)
        denominator = tl.maximum(tl.sum(rounded(g, EXACT) * z[None, :], axis=1), floor)
        found = matrix_product(g, high, low, tl.zeros([BT, BV], tl.float32), EXACT)
        # Where the memory is empty its share is 0, but what was read need not be finite.
        far = tl.where(share > 0, found / denominator[:, None], 0.0)
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
) -> Tensor:
    """Equations (3) and (6) of arXiv:2404.07143 for every query: `memory.retrieve` and `memory.mix` of uniform rows.

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

    Returns:
        `[b, tokens, h, d]` in the dtype of `local_output`.
    """
    batch, length, heads, dim = q.shape
    q, local_output = _last_axis_contiguous(q), _last_axis_contiguous(local_output)
    matrices, normalizers, has_memory = matrices.contiguous(), normalizers.contiguous(), _bytes(has_memory)
    mixed = torch.empty(q.shape, dtype=local_output.dtype, device=q.device)
    segments, groups = matrices.shape[1:3]
    exact, parts, norm = is_exact(q, local_output), parts_of(segment_length), scale is not None
    tiles = Tiles.of("read", dim, segment_length, exact, shared_memory(q.device))
    with on_device_of(q):
        read_kernel[(batch * segments * parts * heads, tiles.wide_blocks)](
            q, local_output, matrices, normalizers, beta, scale if norm else q, bias if norm else q,
            q if has_memory is None else has_memory, mixed,
            *q.stride()[:3], *local_output.stride()[:3], *mixed.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=segment_length if parts == 1 else PART, SHARED_BY=heads // groups,
            NORM=norm, MASKED=has_memory is not None, MIX_EMPTY=mix_empty, EXACT=exact,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return mixed


@read_and_mix.register_fake
def _(q, local_output, matrices, normalizers, beta, scale, bias, has_memory, offset, segment_length, mix_empty, eps, floor):
    return local_output.new_empty(q.shape)


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def read_backward_kernel(
    q, local, d_mixed, matrices, normalizers, beta, scale, bias, has_memory,
    dq, d_local, weights, z_weights, d_beta, d_scale, d_bias,
    q_batch, q_token, q_head, local_batch, local_token, local_head, d_batch, d_token, d_head, dq_batch, dq_token, dq_head,
    length, offset, segments, parts, segment_length, heads, eps, floor,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr,
    NORM: tl.constexpr, MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, one query head.

    With g = sigma(q), u = g M, d = g.z, the mix is p u / d + l local. Left behind for the memory's gradient
    dM = sum a g dmix^T, dz = sum c g are a = p / d and c = -p (u.dmix) / d^2; the gradient of g is a M dmix + c z.
    """
    program = tl.program_id(0)
    head, part, segment = program % heads, program // heads % parts, program // heads // parts % segments
    b = (program // heads // parts // segments).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length)
    memory = (b * segments + segment) * (heads // SHARED_BY) + head // SHARED_BY
    z = tl.load(normalizers + memory * D + columns, mask=inside, other=0.0)
    weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
    query_scale, query_bias = load_scale(scale, bias, head, columns, inside, D, NORM)
    scale_sum, bias_sum = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    beta_sum = tl.zeros([BT], tl.float32)
    if BV == BD:
        high, low = load_matrix(matrices + memory * D * D, columns, columns, inside, inside, D, EXACT)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        valid = tokens < last
        x = load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside)
        normal, inverse = normalized(x, eps, D, NORM)
        g = features(normal, query_scale, query_bias, valid, NORM)
        denominator = tl.sum(rounded(g, EXACT) * z[None, :], axis=1)
        held = denominator >= floor
        denominator = tl.maximum(denominator, floor)
        from_memory, from_local = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
        dg = tl.zeros([BT, BD], tl.float32)
        for block in tl.range(0, BD // BV, num_stages=1):
            wide = block * BV + tl.arange(0, BV)
            inside_wide = wide < D
            if BV < BD:
                high, low = load_matrix(matrices + memory * D * D, columns, wide, inside, inside_wide, D, EXACT)
            near = load_tile(local + b * local_batch + head * local_head, local_token, tokens, wide, valid, inside_wide)
            dy = load_tile(d_mixed + b * d_batch + head * d_head, d_token, tokens, wide, valid, inside_wide)
            found = matrix_product(g, high, low, tl.zeros([BT, BV], tl.float32), EXACT)
            from_memory += tl.sum(found * dy, axis=1)
            from_local += tl.sum(near * dy, axis=1)
            store_tile(d_local + b * dq_batch + head * dq_head, dq_token, tokens, wide, valid, inside_wide, local_share * dy)
            dg = matrix_product(dy, tl.trans(high), tl.trans(low), dg, EXACT)
        # Where the memory is empty nothing of it may pass, finite or not.
        readable = share > 0
        from_memory = tl.where(readable, from_memory / denominator, 0.0)
        a = share / denominator
        c = tl.where(held, -a * from_memory, 0.0)
        place = (b * length + tokens) * heads + head
        tl.store(weights + place, a, mask=valid)
        tl.store(z_weights + place, c, mask=valid)
        beta_sum += from_memory - from_local
        dx = tl.where(readable, a[:, None] * dg + c[:, None] * z[None, :], 0.0) * tl.minimum(g, 1.0)
        if NORM:
            scale_sum += tl.sum(dx * normal, axis=0)
            bias_sum += tl.sum(dx, axis=0)
        dx = through_norm(dx, normal, inverse, query_scale, D, NORM)
        store_tile(dq + b * dq_batch + head * dq_head, dq_token, tokens, columns, valid, inside, dx)
    tl.store(d_beta + program, asked * weight * (1.0 - weight) * tl.sum(beta_sum, axis=0))
    if NORM:
        tl.store(d_scale + program.to(tl.int64) * D + columns, scale_sum, mask=inside)
        tl.store(d_bias + program.to(tl.int64) * D + columns, bias_sum, mask=inside)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, local_output, matrices, normalizers, beta, scale and bias; empty where there was None."""
    batch, length, heads, dim = q.shape
    d_mixed, q, local_output = (_last_axis_contiguous(x) for x in (d_mixed, q, local_output))
    matrices, normalizers, has_memory = matrices.contiguous(), normalizers.contiguous(), _bytes(has_memory)
    segments, groups = matrices.shape[1:3]
    exact, parts, norm = is_exact(q, local_output, d_mixed), parts_of(segment_length), scale is not None
    tiles = Tiles.of("backward", dim, segment_length, exact, shared_memory(q.device))
    dq, d_local = (torch.empty(q.shape, dtype=x.dtype, device=q.device) for x in (q, local_output))
    weights, z_weights = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    sums = (batch, segments, parts, heads)
    d_beta = torch.empty(sums, dtype=torch.float32, device=q.device)
    d_scale, d_bias = (torch.empty((*sums, dim) if norm else 0, dtype=torch.float32, device=q.device) for _ in range(2))
    with on_device_of(q):
        read_backward_kernel[(batch * segments * parts * heads,)](
            q, local_output, d_mixed, matrices, normalizers, beta, scale if norm else q, bias if norm else q,
            q if has_memory is None else has_memory, dq, d_local, weights, z_weights, d_beta, d_scale, d_bias,
            *q.stride()[:3], *local_output.stride()[:3], *d_mixed.stride()[:3], *dq.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps, floor,
            D=dim, BD=tiles.BD, BV=tiles.BV, BT=tiles.BT, PART=segment_length if parts == 1 else PART, SHARED_BY=heads // groups,
            NORM=norm, MASKED=has_memory is not None, MIX_EMPTY=mix_empty, EXACT=exact,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    d_matrices, d_normalizers = sum_outer(
        q, d_mixed, weights, z_weights, scale, bias, groups, offset, segments, segments, segment_length, eps
    )
    d_beta = d_beta.sum(dim=(0, 1, 2)).to(beta.dtype)
    if norm:
        d_scale, d_bias = d_scale.sum(dim=(0, 1, 2)).to(scale.dtype), d_bias.sum(dim=(0, 1, 2)).to(bias.dtype)
    return dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias


@read_and_mix_backward.register_fake
def _(
    d_mixed, q, local_output, matrices, normalizers, beta, scale, bias, has_memory,
    offset, segment_length, mix_empty, eps, floor,
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
    *tensors, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, ctx.floor = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_mixed):
    saved = ctx.saved_tensors
    dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias = read_and_mix_backward(
        d_mixed, *saved, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, ctx.floor
    )
    if saved[5] is None:
        d_scale = d_bias = None
    return dq, d_local, d_matrices, d_normalizers, d_beta, d_scale, d_bias, *[None] * 6


read_and_mix.register_autograd(_backward, setup_context=_save)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
