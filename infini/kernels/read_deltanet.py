"""Reading the memory of `deltanet` and mixing it with the local output, as a custom operator with its gradient.

A unit query reads u = q M, which an RMSNorm brings to one size; there is no normalizer. Queries and local output are read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.deltanet import single, through_unit, unit
from infini.kernels.parts import add_rows, as_bytes, last_axis_contiguous, load_tile, store_tile, tokens_of
from infini.kernels.read import room_for, shares
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory


@triton.jit
def load_square(matrix, columns, inside, D: tl.constexpr):
    """A memory `[BD, BD]`."""
    return tl.load(matrix + columns[:, None] * D + columns[None, :], mask=inside[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def read_deltanet_kernel(
    q, local, matrices, norm, beta, has_memory, bounds, mixed,
    q_batch, q_token, q_head, local_batch, local_token, local_head, mixed_batch, mixed_token, mixed_head,
    length, offset, segments, parts, segment_length, heads, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr,
    MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, one query head."""
    program = tl.program_id(0)
    head, part, segment = program % heads, program // heads % parts, program // heads // parts % segments
    b = (program // heads // parts // segments).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    memory = (b * segments + segment) * (heads // SHARED_BY) + head // SHARED_BY
    matrix = load_square(matrices + memory * D * D, columns, inside, D)
    weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
    scale = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        valid = tokens < last
        x, size = unit(load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside))
        near = load_tile(local + b * local_batch + head * local_head, local_token, tokens, columns, valid, inside)
        u = single(x, matrix, tl.zeros([BT, BD], tl.float32), EXACT)
        inverse = tl.rsqrt(tl.sum(u * u, axis=1) / D + eps)
        # Where the memory is empty its share is 0, but what was read need not be finite.
        far = tl.where(share > 0, u * inverse[:, None] * scale[None, :], 0.0)
        out = share * far + local_share * near
        store_tile(mixed + b * mixed_batch + head * mixed_head, mixed_token, tokens, columns, valid, inside, out)


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def read_deltanet_backward_kernel(
    q, local, d_mixed, matrices, norm, beta, has_memory, bounds, dq, d_local, d_matrices, d_beta, d_norm,
    q_batch, q_token, q_head, local_batch, local_token, local_head, d_batch, d_token, d_head, dq_batch, dq_token, dq_head,
    length, offset, segments, parts, segment_length, heads, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr, SHARED_BY: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, MIX_EMPTY: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: a part of one segment, one query head.

    With y = u / rms(u) and t the gradient of y, du = (t - y mean(t y)) / rms(u); then dq = du M^T and dM = sum q^T du.
    """
    program = tl.program_id(0)
    head, part, segment = program % heads, program // heads % parts, program // heads // parts % segments
    b = (program // heads // parts // segments).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    first, last = tokens_of(segment, part, segment_length, PART, offset, length, bounds, b * segments + segment, RAGGED)
    memory = (b * segments + segment) * (heads // SHARED_BY) + head // SHARED_BY
    matrix = load_square(matrices + memory * D * D, columns, inside, D)
    weight, share, local_share, asked = shares(beta, has_memory, head, b * segments + segment, MASKED, MIX_EMPTY)
    scale = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    readable = share > 0
    d_matrix, norm_sum = tl.zeros([BD, BD], tl.float32), tl.zeros([ROWS, BD], tl.float32)
    beta_sum = tl.zeros([BT], tl.float32)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        valid = tokens < last
        x, size = unit(load_tile(q + b * q_batch + head * q_head, q_token, tokens, columns, valid, inside))
        u = single(x, matrix, tl.zeros([BT, BD], tl.float32), EXACT)
        inverse = tl.rsqrt(tl.sum(u * u, axis=1) / D + eps)
        y = tl.where(readable, u * inverse[:, None], 0.0)
        near = load_tile(local + b * local_batch + head * local_head, local_token, tokens, columns, valid, inside).to(tl.float32)
        dy = load_tile(d_mixed + b * d_batch + head * d_head, d_token, tokens, columns, valid, inside).to(tl.float32)
        store_tile(d_local + b * dq_batch + head * dq_head, dq_token, tokens, columns, valid, inside, local_share * dy)
        beta_sum += tl.sum((y * scale[None, :] - near) * dy, axis=1)
        norm_sum = add_rows(norm_sum, share * dy * y, BT, ROWS, BD)
        t = share * dy * scale[None, :]
        du = (t - y * (tl.sum(t * y, axis=1) / D)[:, None]) * inverse[:, None]
        du = tl.where(readable, du, 0.0)
        d_matrix = single(tl.trans(x), du, d_matrix, EXACT)
        dx = single(du, tl.trans(matrix), tl.zeros([BT, BD], tl.float32), EXACT)
        dx = through_unit(tl.where(readable, dx, 0.0), x, size)
        store_tile(dq + b * dq_batch + head * dq_head, dq_token, tokens, columns, valid, inside, dx)
    here = program.to(tl.int64)
    tl.store(d_beta + here, asked * weight * (1.0 - weight) * tl.sum(beta_sum, axis=0))
    tl.store(d_norm + here * D + columns, tl.sum(norm_sum, axis=0), mask=inside)
    at = d_matrices + here * D * D + columns[:, None] * D + columns[None, :]
    tl.store(at, d_matrix, mask=inside[:, None] & inside[None, :])


@torch.library.custom_op("infini::read_deltanet", mutates_args=())
def read_deltanet(
    q: Tensor,
    local_output: Tensor,
    matrices: Tensor,
    norm: Tensor,
    beta: Tensor,
    has_memory: Tensor | None,
    offset: int,
    segment_length: int,
    mix_empty: bool,
    eps: float,
    bounds: Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """`memory.retrieve` of unit queries, an RMSNorm, and `memory.mix`.

    Args:
        norm: weight of the RMSNorm `[d]`.
        eps: of the RMSNorm.
        q, local_output, matrices, beta, has_memory, offset, segment_length, mix_empty, bounds, padded: as of
            `read_and_mix`.

    Returns:
        `[b, tokens, h, d]` in the dtype of `local_output`.
    """
    batch, length, heads, dim = q.shape
    q, local_output = last_axis_contiguous(q), last_axis_contiguous(local_output)
    matrices, has_memory = matrices.contiguous(), as_bytes(has_memory)
    mixed = room_for(padded)(q.shape, dtype=local_output.dtype, device=q.device)
    segments, groups = matrices.shape[1:3]
    exact = is_exact(q, local_output)
    tiles = Tiles.of("read_deltanet", dim, segment_length, exact, shared_memory(q.device))
    parts, part = tiles.parts(segment_length)
    with on_device_of(q):
        read_deltanet_kernel[(batch * segments * parts * heads,)](
            q, local_output, matrices, norm, beta, q if has_memory is None else has_memory, q if bounds is None else bounds, mixed,
            *q.stride()[:3], *local_output.stride()[:3], *mixed.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps,
            D=dim, BD=tiles.BD, BT=tiles.BT, PART=part, SHARED_BY=heads // groups,
            MASKED=has_memory is not None, MIX_EMPTY=mix_empty, RAGGED=bounds is not None, EXACT=exact, **tiles.options,
        )  # fmt: skip
    return mixed


@read_deltanet.register_fake
def _(q, local_output, matrices, norm, beta, has_memory, offset, segment_length, mix_empty, eps, bounds=None, padded=False):
    return local_output.new_empty(q.shape)


@torch.library.custom_op("infini::read_deltanet_backward", mutates_args=())
def read_deltanet_backward(
    d_mixed: Tensor,
    q: Tensor,
    local_output: Tensor,
    matrices: Tensor,
    norm: Tensor,
    beta: Tensor,
    has_memory: Tensor | None,
    offset: int,
    segment_length: int,
    mix_empty: bool,
    eps: float,
    bounds: Tensor | None = None,
    padded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, local_output, matrices, norm and beta."""
    batch, length, heads, dim = q.shape
    d_mixed, q, local_output = (last_axis_contiguous(x) for x in (d_mixed, q, local_output))
    matrices, has_memory = matrices.contiguous(), as_bytes(has_memory)
    segments, groups = matrices.shape[1:3]
    exact = is_exact(q, local_output, d_mixed)
    tiles = Tiles.of("read_deltanet", dim, segment_length, exact, shared_memory(q.device))
    parts, part = tiles.parts(segment_length)
    dq, d_local = (room_for(padded)(q.shape, dtype=x.dtype, device=q.device) for x in (q, local_output))
    # One memory for each head and part; they are added up behind.
    sums = (batch, segments, parts, groups, heads // groups)
    d_matrices, d_norm, d_beta = (
        torch.empty(*sums, *of_one, dtype=torch.float32, device=q.device) for of_one in ((dim, dim), (dim,), ())
    )
    with on_device_of(q):
        read_deltanet_backward_kernel[(batch * segments * parts * heads,)](
            q, local_output, d_mixed, matrices, norm, beta, q if has_memory is None else has_memory, q if bounds is None else bounds,
            dq, d_local, d_matrices, d_beta, d_norm,
            *q.stride()[:3], *local_output.stride()[:3], *d_mixed.stride()[:3], *dq.stride()[:3],
            length, offset, segments, parts, segment_length, heads, eps,
            D=dim, BD=tiles.BD, BT=tiles.BT, PART=part, SHARED_BY=heads // groups, ROWS=tiles.rows,
            MASKED=has_memory is not None, MIX_EMPTY=mix_empty, RAGGED=bounds is not None, EXACT=exact, **tiles.options,
        )  # fmt: skip
    if parts * (heads // groups) == 1:
        d_matrices = d_matrices.reshape(matrices.shape)
    else:
        d_matrices = d_matrices.sum(dim=(2, 4))
    return (
        dq,
        d_local,
        d_matrices,
        d_norm.sum(dim=(0, 1, 2, 3, 4)).to(norm.dtype),
        d_beta.sum(dim=(0, 1, 2)).flatten().to(beta.dtype),
    )


@read_deltanet_backward.register_fake
def _(d_mixed, q, local_output, matrices, norm, beta, has_memory, offset, segment_length, mix_empty, eps, bounds=None, padded=False):
    return (
        q.new_empty(q.shape),
        local_output.new_empty(q.shape),
        matrices.new_empty(matrices.shape),
        norm.new_empty(norm.shape),
        beta.new_empty(beta.shape),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, bounds, ctx.padded = inputs
    ctx.save_for_backward(*tensors, bounds)


def _backward(ctx, d_mixed):
    *saved, bounds = ctx.saved_tensors
    found = read_deltanet_backward(d_mixed, *saved, ctx.offset, ctx.segment_length, ctx.mix_empty, ctx.eps, bounds, ctx.padded)
    return *found, *[None] * 7


read_deltanet.register_autograd(_backward, setup_context=_save)
