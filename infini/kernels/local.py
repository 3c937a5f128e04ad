"""Attention within reach as a custom operator with its gradient: every query sees a stretch of keys that ends at its own.

softmax(q k^T / sqrt(d)) v over the keys from `earliest` to the query's own. Segments, windows, packed documents, padding and open
segments differ in `earliest` alone. It never falls along a row, so what a tile of queries sees is one stretch of keys, and the
queries that see a tile of keys are one stretch too. No mask and no scores are ever stored; nothing is added up by several programs
at once, so the same inputs give the same bits.

Places are counted in keys: query i stands at key `history` + i, where `history` is the number of keys before the first query.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.parts import INTERPRETED, last_axis_contiguous, load_tile, store_tile
from infini.kernels.tiles import LocalTiles, on_device_of, shared_memory

# Tiles of queries that are looked at together for where those end that see a tile of keys.
AT_ONCE = tl.constexpr(64)


@triton.jit
def dot(a, b, total):
    """total + a b with fp32 sums: of fp16 and bf16 as they are, of fp32 by three TF32 products to fp32's precision."""
    if INTERPRETED:  # which has no bf16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def reach_of(earliest, first, tokens, history, BQ: tl.constexpr, BK: tl.constexpr):
    """The keys that any of the BQ queries from `first` on sees, down to the begin of a tile, and those that every one of them sees."""
    last = tl.minimum(first + BQ, tokens) - 1
    start = tl.load(earliest + first).to(tl.int32) // BK * BK
    return start, history + last + 1, tl.load(earliest + last).to(tl.int32), history + first + 1


@triton.jit(do_not_specialize=["tokens", "history", "earliest_batch"])
def local_kernel(
    q, k, v, earliest, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    earliest_batch, tokens, history, heads, to_exponent,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SHARED_BY: tl.constexpr,
):  # fmt: skip
    """One program: BQ queries of one head. `to_exponent` makes of q.k a power of two: log2(e) / sqrt(d)."""
    program, tiles = tl.program_id(0), tl.cdiv(tokens, BQ)
    head, first = (program % heads).to(tl.int64), program // heads % tiles * BQ
    b = (program // heads // tiles).to(tl.int64)
    columns, places, keys = tl.arange(0, BD), first + tl.arange(0, BQ), tokens + history
    inside, valid = columns < D, places < tokens
    earliest += b * earliest_batch
    start, stop, whole, cut = reach_of(earliest, first, tokens, history, BQ, BK)
    sees_from = tl.load(earliest + places, mask=valid, other=0).to(tl.int32)
    q_tile = load_tile(q + b * q_batch + head * q_head, q_token, places, columns, valid, inside)
    k_at, v_at = k + b * k_batch + head // SHARED_BY * k_head, v + b * v_batch + head // SHARED_BY * v_head
    # The lowest finite number: a tile of which a query sees nothing leaves its sums 0, and no difference of infinities arises.
    highest, total = tl.full([BQ], -3.0e38, tl.float32), tl.zeros([BQ], tl.float32)
    summed = tl.zeros([BQ, BD], tl.float32)
    for at in tl.range(start, stop, BK):
        key = at + tl.arange(0, BK)
        there = key < keys
        k_tile = load_tile(k_at, k_token, key, columns, there, inside)
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros([BQ, BK], tl.float32)) * to_exponent
        if (at < whole) | (at + BK > cut):
            seen = (key[None, :] >= sees_from[:, None]) & (key[None, :] <= (places + history)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        fades = tl.exp2(highest - higher)
        total = total * fades + tl.sum(p, axis=1)
        v_tile = load_tile(v_at, v_token, key, columns, there, inside)
        summed = dot(p.to(v_tile.dtype), v_tile, summed * fades[:, None])
        highest = higher
    store_tile(out + b * out_batch + head * out_head, out_token, places, columns, valid, inside, summed / total[:, None])
    tl.store(lse + (b * heads + head) * tokens + places, highest + tl.log2(total), mask=valid)


@triton.jit(do_not_specialize=["tokens", "history", "earliest_batch"])
def local_queries_kernel(
    q, k, v, earliest, out, d_out, lse, dq, delta,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    d_batch, d_token, d_head, earliest_batch, tokens, history, heads, to_exponent, to_score,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SHARED_BY: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BQ queries of one head, and what the keys' gradients need of them: delta = out . d_out.

    With p the shares, the gradient of the scores is p (d_out v^T - delta). `dq` is laid out like `out`.
    """
    program, tiles = tl.program_id(0), tl.cdiv(tokens, BQ)
    head, first = (program % heads).to(tl.int64), program // heads % tiles * BQ
    b = (program // heads // tiles).to(tl.int64)
    columns, places, keys = tl.arange(0, BD), first + tl.arange(0, BQ), tokens + history
    inside, valid = columns < D, places < tokens
    earliest += b * earliest_batch
    start, stop, whole, cut = reach_of(earliest, first, tokens, history, BQ, BK)
    sees_from = tl.load(earliest + places, mask=valid, other=0).to(tl.int32)
    d_tile = load_tile(d_out + b * d_batch + head * d_head, d_token, places, columns, valid, inside)
    out_tile = load_tile(out + b * out_batch + head * out_head, out_token, places, columns, valid, inside)
    of_head = (b * heads + head) * tokens + places
    row_delta = tl.sum(d_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    tl.store(delta + of_head, row_delta, mask=valid)
    row_lse = tl.load(lse + of_head, mask=valid, other=0.0)
    q_tile = load_tile(q + b * q_batch + head * q_head, q_token, places, columns, valid, inside)
    k_at, v_at = k + b * k_batch + head // SHARED_BY * k_head, v + b * v_batch + head // SHARED_BY * v_head
    summed = tl.zeros([BQ, BD], tl.float32)
    for at in tl.range(start, stop, BK):
        key = at + tl.arange(0, BK)
        there = key < keys
        k_tile = load_tile(k_at, k_token, key, columns, there, inside)
        v_tile = load_tile(v_at, v_token, key, columns, there, inside)
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros([BQ, BK], tl.float32)) * to_exponent
        if (at < whole) | (at + BK > cut):
            seen = (key[None, :] >= sees_from[:, None]) & (key[None, :] <= (places + history)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        dp = dot(d_tile, tl.trans(v_tile), tl.zeros([BQ, BK], tl.float32))
        ds = tl.exp2(scores - row_lse[:, None]) * (dp - row_delta[:, None])
        summed = dot(ds.to(k_tile.dtype), k_tile, summed)
    store_tile(dq + b * out_batch + head * out_head, out_token, places, columns, valid, inside, summed * to_score)


@triton.jit(do_not_specialize=["tokens", "history", "span", "earliest_batch"])
def local_keys_kernel(
    q, k, v, earliest, d_out, lse, delta, dk, dv,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, d_batch, d_token, d_head, dk_batch, dk_token, dk_head,
    earliest_batch, tokens, history, span, heads, to_exponent, to_score,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SHARED_BY: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BK keys and values of one head, from all query heads that share it.

    Scores stand here with a key in each row.
    """
    keys, groups = tokens + history, heads // SHARED_BY
    program, tiles = tl.program_id(0), tl.cdiv(keys, BK)
    group, at = (program % groups).to(tl.int64), program // groups % tiles * BK
    b = (program // groups // tiles).to(tl.int64)
    columns, key = tl.arange(0, BD), at + tl.arange(0, BK)
    inside, there = columns < D, key < keys
    earliest += b * earliest_batch
    last = tl.minimum(at + BK, keys) - 1
    # The tiles of queries from the first key's own on that see any of these keys, and how many of them see back to the first.
    first = tl.maximum(at - history, 0)
    most = tl.cdiv(tl.maximum(tl.minimum(tokens, last - history + span) - first, 0), BQ)
    seeing, whole = 0, 0
    for some in tl.range(0, most, AT_ONCE):
        begins = first + (some + tl.arange(0, AT_ONCE)) * BQ
        among = some + tl.arange(0, AT_ONCE) < most
        head_of = tl.load(earliest + begins, mask=among, other=keys)
        tail_of = tl.load(earliest + tl.minimum(begins + BQ, tokens) - 1, mask=among, other=keys)
        seeing += tl.sum((head_of <= last).to(tl.int32), axis=0)
        whole += tl.sum((tail_of <= at).to(tl.int32), axis=0)
    k_tile = load_tile(k + b * k_batch + group * k_head, k_token, key, columns, there, inside)
    v_tile = load_tile(v + b * v_batch + group * v_head, v_token, key, columns, there, inside)
    dk_sum, dv_sum = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    for step in tl.range(0, SHARED_BY * seeing):
        head, tile = group * SHARED_BY + step // tl.maximum(seeing, 1), step % tl.maximum(seeing, 1)
        places = first + tile * BQ + tl.arange(0, BQ)
        valid = places < tokens
        q_tile = load_tile(q + b * q_batch + head * q_head, q_token, places, columns, valid, inside)
        of_head = (b * heads + head) * tokens + places
        row_lse = tl.load(lse + of_head, mask=valid, other=0.0)
        scores = dot(k_tile, tl.trans(q_tile), tl.zeros([BK, BQ], tl.float32)) * to_exponent
        if (tile >= whole) | (first + tile * BQ + history < last):
            sees_from = tl.load(earliest + places, mask=valid, other=0).to(tl.int32)
            seen = (key[:, None] >= sees_from[None, :]) & (key[:, None] <= (places + history)[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - row_lse[None, :])
        d_tile = load_tile(d_out + b * d_batch + head * d_head, d_token, places, columns, valid, inside)
        row_delta = tl.load(delta + of_head, mask=valid, other=0.0)
        dv_sum = dot(p.to(d_tile.dtype), d_tile, dv_sum)
        dp = dot(v_tile, tl.trans(d_tile), tl.zeros([BK, BQ], tl.float32))
        ds = p * (dp - row_delta[None, :])
        dk_sum = dot(ds.to(q_tile.dtype), q_tile, dk_sum)
    dk_at, dv_at = dk + b * dk_batch + group * dk_head, dv + b * dk_batch + group * dk_head
    store_tile(dk_at, dk_token, key, columns, there, inside, dk_sum * to_score)
    store_tile(dv_at, dk_token, key, columns, there, inside, dv_sum)


@torch.library.custom_op("infini::attend_in_reach", mutates_args=())
def attend_in_reach(q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Equation (2) of arXiv:2404.07143 over the keys within reach: `local.local_attention`.

    Args:
        q: `[b, tokens, h, d]` in bf16, fp16 or fp32; the last query stands at the last key.
        k, v: `[b, history + tokens, g, d]` in the dtype of `q`; query head i belongs to head i // (h // g).
        earliest: int64 `[b, tokens]` or `[1, tokens]`, the first key that each query sees; at most its own, and never falling along
            a row.
        span: no query sees more keys.

    Returns:
        `[b, tokens, h, d]` in the dtype of `q`, and the binary logarithm of each query's sum of exponentials, fp32 `[b, h, tokens]`,
        through which no gradient goes.
    """
    return attended_by(q, k, v, earliest)


@attend_in_reach.register_fake
def _(q, k, v, earliest, span):
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def attended_by(q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, tiles: LocalTiles | None = None) -> tuple[Tensor, Tensor]:
    """`attend_in_reach` with other tiles than the table's."""
    batch, tokens, heads, dim = q.shape
    q, k, v, earliest = (last_axis_contiguous(x) for x in (q, k, v, earliest))
    tiles = (tiles or LocalTiles.of("local", dim, q.dtype, shared_memory(q.device))).within(tokens)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        local_kernel[(batch * triton.cdiv(tokens, tiles.BQ) * heads,)](
            q, k, v, earliest, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            _stride_of_rows(earliest), tokens, k.shape[1] - tokens, heads, dim**-0.5 / math.log(2),
            D=dim, BD=tiles.BD, BQ=tiles.BQ, BK=tiles.BK, SHARED_BY=heads // k.shape[2], **tiles.options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("infini::attend_in_reach_backward", mutates_args=())
def attend_in_reach_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, out: Tensor, lse: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return gradients_by(d_out, q, k, v, earliest, out, lse, span)


def gradients_by(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, out: Tensor, lse: Tensor, span: int,
    tiles: tuple[LocalTiles | None, LocalTiles | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attend_in_reach_backward` with other tiles than the table's, for the queries' gradient and for that of keys and values."""
    dq, delta = gradient_of_queries(d_out, q, k, v, earliest, out, lse, tiles[0])
    return dq, *gradients_of_keys(d_out, q, k, v, earliest, lse, delta, span, tiles[1])


def gradient_of_queries(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, out: Tensor, lse: Tensor, tiles: LocalTiles | None = None
) -> tuple[Tensor, Tensor]:
    """dq, and delta fp32 `[b, h, tokens]` for `gradients_of_keys`."""
    batch, tokens, heads, dim = q.shape
    d_out, q, k, v, earliest = (last_axis_contiguous(x) for x in (d_out, q, k, v, earliest))
    tiles = (tiles or LocalTiles.of("local_queries", dim, q.dtype, shared_memory(q.device))).within(tokens)
    dq, delta = torch.empty_like(out), torch.empty_like(lse)
    with on_device_of(q):
        local_queries_kernel[(batch * triton.cdiv(tokens, tiles.BQ) * heads,)](
            q, k, v, earliest, out, d_out, lse, dq, delta,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *d_out.stride()[:3],
            _stride_of_rows(earliest), tokens, k.shape[1] - tokens, heads, dim**-0.5 / math.log(2), dim**-0.5,
            D=dim, BD=tiles.BD, BQ=tiles.BQ, BK=tiles.BK, SHARED_BY=heads // k.shape[2], **tiles.options,
        )  # fmt: skip
    return dq, delta


def gradients_of_keys(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, earliest: Tensor, lse: Tensor, delta: Tensor, span: int,
    tiles: LocalTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv."""
    (batch, tokens, heads, dim), (keys, groups) = q.shape, k.shape[1:3]
    d_out, q, k, v, earliest = (last_axis_contiguous(x) for x in (d_out, q, k, v, earliest))
    tiles = (tiles or LocalTiles.of("local_keys", dim, q.dtype, shared_memory(q.device))).within(tokens)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    with on_device_of(q):
        local_keys_kernel[(batch * triton.cdiv(keys, tiles.BK) * groups,)](
            q, k, v, earliest, d_out, lse, delta, dk, dv,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3], *dk.stride()[:3],
            _stride_of_rows(earliest), tokens, keys - tokens, min(span, keys), heads, dim**-0.5 / math.log(2), dim**-0.5,
            D=dim, BD=tiles.BD, BQ=tiles.BQ, BK=tiles.BK, SHARED_BY=heads // groups, **tiles.options,
        )  # fmt: skip
    return dk, dv


@attend_in_reach_backward.register_fake
def _(d_out, q, k, v, earliest, out, lse, span):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _stride_of_rows(earliest: Tensor) -> int:
    """0 where all rows see alike."""
    return earliest.stride(0) if len(earliest) > 1 else 0


def _save(ctx, inputs, output):
    *tensors, ctx.span = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out, _):
    return *attend_in_reach_backward(d_out, *ctx.saved_tensors, ctx.span), None, None


attend_in_reach.register_autograd(_backward, setup_context=_save)
