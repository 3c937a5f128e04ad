"""The `deltanet` write of whole segments as a custom operator, with its gradient.

Tokens write one after the other: M += w k (v - k M)^T with unit keys k. In chunks of N tokens (WY form, arXiv:2406.06484) that is
M += K^T X with X = U - W M and [W U] = (I + strictly_lower(w K K^T))^-1 w [K V]. W and U of all chunks are made beside each other;
a segment sends [I 0] through its chunks, which gives its map M -> (I - G) M + B, and the maps are scanned. The gradient goes through
the chunks of all segments beside each other, back from the gradients of the scan: M_{c-1} = M_c - K^T X is cheaper than a kept M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini.kernels.parts import as_bytes, last_axis_contiguous, load_tile, product, store_tile
from infini.kernels.scan import affine_scan
from infini.kernels.tiles import Tiles, is_exact, on_device_of, shared_memory

SMALLEST_NORM = tl.constexpr(1e-12)  # as of infini.memory.unit


@triton.jit
def single(a, b, total, EXACT: tl.constexpr):
    """total + a b of fp32 operands: one TF32 product, three if EXACT.

    In bf16 a key is told from its neighbor by too few bits: what one token writes is what the one before left over, and errors add up.
    """
    return tl.dot(a, b, total, input_precision="tf32x3" if EXACT else "tf32")


@triton.jit
def unit(x):
    """x / |x|, and |x|, at least SMALLEST_NORM."""
    x = x.to(tl.float32)
    size = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SMALLEST_NORM)
    return x / size[:, None], size


@triton.jit
def through_unit(gradient, x, size):
    """The gradient of what `unit` made x of."""
    along = tl.where(size > SMALLEST_NORM, tl.sum(gradient * x, axis=1), 0.0)
    return (gradient - x * along[:, None]) / size[:, None]


@triton.jit
def unit_lower_inverse(lower, N: tl.constexpr):
    """(I + L)^-1 `[N, N]` of the entries below the diagonal; `infini.memory.unit_lower_inverse` says how."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    apart = i ^ j
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where((i > j) & (apart == 1), lower, 0.0)
    for m in tl.static_range(2, N):
        if m & (m - 1) == 0:
            between = tl.where((i > j) & (apart >= m) & (apart < 2 * m), lower, 0.0)
            half = product(inverse, between, tl.zeros([N, N], tl.float32), True)
            inverse -= product(half, inverse, tl.zeros([N, N], tl.float32), True)
    return inverse


@triton.jit
def written_tokens(segment, segment_length, chunks, offset, bounds, place, N: tl.constexpr, RAGGED: tl.constexpr):
    """First token of a segment, how many are written of it, and their chunks; arguments as of `tokens_of`."""
    if RAGGED:
        first = tl.load(bounds + 2 * place)
        size = tl.load(bounds + 2 * place + 1) - first
        return first, size, tl.cdiv(size, N)
    return offset + segment * segment_length, segment_length, chunks


@triton.jit
def load_chunk(k, strength, k_token, tokens, valid, place, columns, inside, N: tl.constexpr, WEIGHTED: tl.constexpr):
    """Unit keys `[N, BD]` of one chunk, their sizes, and strengths, 0 for what is no token."""
    keys, size = unit(load_tile(k, k_token, tokens, columns, valid, inside))
    w = tl.where(valid, 1.0, 0.0)
    if WEIGHTED:
        w = tl.load(strength + place, mask=valid, other=0.0)
    return keys, size, w


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def prepare_kernel(
    k, v, strength, bounds, of_state, of_values,
    k_batch, k_token, k_head, v_batch, v_token, v_head, length, offset, segments, chunks, segment_length, groups,
    D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: W and U of one chunk."""
    program = tl.program_id(0)
    chunk, group, segment = program % chunks, program // chunks % groups, program // chunks // groups % segments
    b = (program // chunks // groups // segments).to(tl.int64)
    columns, rows = tl.arange(0, BD), tl.arange(0, N)
    first, written, filled = written_tokens(segment, segment_length, chunks, offset, bounds, b * segments + segment, N, RAGGED)
    if RAGGED:
        if chunk >= filled:
            return
    inside, valid = columns < D, chunk * N + rows < written
    tokens = first + chunk * N + rows
    place = (b * length + tokens) * groups + group
    keys, size, w = load_chunk(k + b * k_batch + group * k_head, strength, k_token, tokens, valid, place, columns, inside, N, WEIGHTED)
    values = load_tile(v + b * v_batch + group * v_head, v_token, tokens, columns, valid, inside).to(tl.float32)
    alike = single(keys, tl.trans(keys), tl.zeros([N, N], tl.float32), EXACT)
    inverse = unit_lower_inverse(w[:, None] * alike, N)
    here, every = program.to(tl.int64) * N * D, rows >= 0
    nothing = tl.zeros([N, BD], tl.float32)
    store_tile(of_state + here, D, rows, columns, every, inside, single(inverse, w[:, None] * keys, nothing, EXACT))
    store_tile(of_values + here, D, rows, columns, every, inside, single(inverse, w[:, None] * values, nothing, EXACT))


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots"])
def map_kernel(
    k, of_state, of_values, bounds, grams, additions,
    k_batch, k_token, k_head, length, offset, segments, slots, chunks, segment_length, groups,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of [G B] of one segment."""
    program, block = tl.program_id(0), tl.program_id(1)
    group, segment, b = program % groups, program // groups % segments, (program // groups // segments).to(tl.int64)
    of_map = block < BD // BV
    columns, rows = tl.arange(0, BD), tl.arange(0, N)
    wide = block % (BD // BV) * BV + tl.arange(0, BV)
    inside, inside_wide = columns < D, wide < D
    identity = columns[:, None] == wide[None, :]
    state = tl.where(of_map & identity, 1.0, 0.0)
    first, written, filled = written_tokens(segment, segment_length, chunks, offset, bounds, b * segments + segment, N, RAGGED)
    for chunk in range(filled):
        valid, every = chunk * N + rows < written, rows >= 0
        tokens = first + chunk * N + rows
        here = (program.to(tl.int64) * chunks + chunk) * N * D
        keys, size = unit(load_tile(k + b * k_batch + group * k_head, k_token, tokens, columns, valid, inside))
        to_state = load_tile(of_state + here, D, rows, columns, every, inside)
        x = load_tile(of_values + here, D, rows, wide, every & (block >= BD // BV), inside_wide).to(tl.float32)
        x = single(-to_state, state, x, EXACT)
        state = single(tl.trans(keys), x, state, EXACT)
    place = columns[:, None] * D + wide[None, :]
    if of_map:
        at = grams + ((b * segments + segment) * groups + group) * D * D
        state = tl.where(identity, 1.0, 0.0) - state
    else:
        at = additions + ((b * slots + segment) * groups + group) * D * D
    tl.store(at + place, state, mask=inside[:, None] & inside_wide[None, :])


@triton.jit(do_not_specialize=["length", "offset", "segments", "slots"])
def chunks_backward_kernel(
    k, of_state, of_values, bounds, before, d_after, changes, d_keys,
    k_batch, k_token, k_head, length, offset, segments, slots, chunks, segment_length, groups,
    D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one segment. Makes X of its chunks from M before it, then goes back from the gradient of M behind it.

    With M' = M + K^T X, X = U - W M and the gradient D of M': dX = K D = dU, dK = X D^T, dW = -dX M^T, and D - W^T dX is the
    gradient of M. dW and dU take the places of W and U, dK as far as it is from K^T X goes to `d_keys`.
    """
    program = tl.program_id(0)
    group, segment, b = program % groups, program // groups % segments, (program // groups // segments).to(tl.int64)
    columns, rows = tl.arange(0, BD), tl.arange(0, N)
    inside, every = columns < D, rows >= 0
    square, place = inside[:, None] & inside[None, :], columns[:, None] * D + columns[None, :]
    memory = ((b * slots + segment) * groups + group) * D * D
    state = tl.load(before + memory + place, mask=square, other=0.0)
    first, written, filled = written_tokens(segment, segment_length, chunks, offset, bounds, b * segments + segment, N, RAGGED)
    k += b * k_batch + group * k_head
    nothing = tl.zeros([N, BD], tl.float32)
    for chunk in range(filled):
        here = (program.to(tl.int64) * chunks + chunk) * N * D
        valid, tokens = chunk * N + rows < written, first + chunk * N + rows
        keys, size = unit(load_tile(k, k_token, tokens, columns, valid, inside))
        x = load_tile(of_values + here, D, rows, columns, every, inside).to(tl.float32)
        x = single(-load_tile(of_state + here, D, rows, columns, every, inside), state, x, EXACT)
        store_tile(changes + here, D, rows, columns, every, inside, x)
        state = single(tl.trans(keys), x, state, EXACT)
    gradient = tl.load(d_after + memory + place, mask=square, other=0.0)
    tl.debug_barrier()  # what other threads of this program have stored is read now
    for back in range(filled):
        chunk = filled - 1 - back
        here = (program.to(tl.int64) * chunks + chunk) * N * D
        valid, tokens = chunk * N + rows < written, first + chunk * N + rows
        keys, size = unit(load_tile(k, k_token, tokens, columns, valid, inside))
        x = load_tile(changes + here, D, rows, columns, every, inside)
        to_state = load_tile(of_state + here, D, rows, columns, every, inside)
        dx = single(keys, gradient, nothing, EXACT)
        store_tile(d_keys + here, D, rows, columns, every, inside, single(x, tl.trans(gradient), nothing, EXACT))
        state = single(tl.trans(-keys), x, state, EXACT)
        store_tile(of_values + here, D, rows, columns, every, inside, dx)
        tl.debug_barrier()
        store_tile(of_state + here, D, rows, columns, every, inside, single(-dx, tl.trans(state), nothing, EXACT))
        gradient = single(tl.trans(to_state), -dx, gradient, EXACT)


@triton.jit(do_not_specialize=["length", "offset", "segments"])
def prepare_backward_kernel(
    k, v, strength, bounds, d_of_state, d_of_values, d_keys, dk, dv, d_strength,
    k_batch, k_token, k_head, v_batch, v_token, v_head, dk_batch, dk_token, dk_head,
    length, offset, segments, chunks, segment_length, groups,
    D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: from dW, dU and the other dK of one chunk to the gradients of keys, values and strengths.

    With T the inverse, W = T wK and U = T wV: d(wK) = T^T dW, d(wV) = T^T dU, dT = dW (wK)^T + dU (wV)^T, and of the entries
    below the diagonal dL = -T^T dT T^T = -(d(wK) W^T + d(wV) U^T).
    """
    program = tl.program_id(0)
    chunk, group, segment = program % chunks, program // chunks % groups, program // chunks // groups % segments
    b = (program // chunks // groups // segments).to(tl.int64)
    columns, rows = tl.arange(0, BD), tl.arange(0, N)
    first, written, filled = written_tokens(segment, segment_length, chunks, offset, bounds, b * segments + segment, N, RAGGED)
    if RAGGED:
        if chunk >= filled:
            return
    inside, valid, every = columns < D, chunk * N + rows < written, rows >= 0
    tokens = first + chunk * N + rows
    place = (b * length + tokens) * groups + group
    keys, size, w = load_chunk(k + b * k_batch + group * k_head, strength, k_token, tokens, valid, place, columns, inside, N, WEIGHTED)
    values = load_tile(v + b * v_batch + group * v_head, v_token, tokens, columns, valid, inside).to(tl.float32)
    square, nothing = tl.zeros([N, N], tl.float32), tl.zeros([N, BD], tl.float32)
    alike = single(keys, tl.trans(keys), square, EXACT)
    inverse = unit_lower_inverse(w[:, None] * alike, N)
    here = program.to(tl.int64) * N * D
    d_state = load_tile(d_of_state + here, D, rows, columns, every, inside)
    d_weighted = single(tl.trans(inverse), d_state, nothing, EXACT)
    lower = single(d_weighted, tl.trans(single(inverse, w[:, None] * keys, nothing, EXACT)), square, EXACT)
    dw = tl.sum(d_weighted * keys, axis=1)
    d_unit = load_tile(d_keys + here, D, rows, columns, every, inside).to(tl.float32) + w[:, None] * d_weighted
    d_values = load_tile(d_of_values + here, D, rows, columns, every, inside)
    d_weighted = single(tl.trans(inverse), d_values, nothing, EXACT)
    lower = single(d_weighted, tl.trans(single(inverse, w[:, None] * values, nothing, EXACT)), lower, EXACT)
    dw += tl.sum(d_weighted * values, axis=1)
    store_tile(dv + b * dk_batch + group * dk_head, dk_token, tokens, columns, valid, inside, w[:, None] * d_weighted)
    lower = tl.where(rows[:, None] > rows[None, :], -lower, 0.0)
    if WEIGHTED:
        tl.store(d_strength + place, dw + tl.sum(lower * alike, axis=1), mask=valid)
    lower = w[:, None] * lower
    d_unit = single(lower + tl.trans(lower), keys, d_unit, EXACT)
    store_tile(dk + b * dk_batch + group * dk_head, dk_token, tokens, columns, valid, inside, through_unit(d_unit, keys, size))


class Chunks:
    """How keys and values of one call are cut up: the arguments that all kernels share."""

    def __init__(
        self, k: Tensor, v: Tensor, strength: Tensor | None, offset: int, written: int, segment_length: int, bounds: Tensor | None = None
    ):
        self.k, self.v = last_axis_contiguous(k), last_axis_contiguous(v)
        self.strength = None if strength is None else strength.contiguous()
        self.batch, length, self.groups, self.dim = k.shape
        self.exact, self.segment_length = is_exact(k, v), segment_length
        self.tokens = self.tiles("prepare").BT
        self.chunks = triton.cdiv(segment_length, self.tokens)
        self.segments = self.batch * written * self.groups
        self.covered = (length, offset, written)
        self.places = (self.chunks, segment_length, self.groups)
        self.bounds = self.k if bounds is None else bounds
        self.ragged = bounds is not None
        self.sizes = {"D": self.dim, "BD": self.tiles("prepare").BD, "N": self.tokens, "RAGGED": self.ragged, "EXACT": self.exact}

    def tiles(self, kernel: str) -> Tiles:
        """Of one of the four kernels."""
        return Tiles.of(kernel, self.dim, self.segment_length, self.exact, shared_memory(self.k.device))

    def room(self) -> Tensor:
        """fp32 `[segments, chunks, N, d]`."""
        return torch.empty(self.segments, self.chunks, self.tokens, self.dim, dtype=torch.float32, device=self.k.device)

    def prepare(self) -> tuple[Tensor, Tensor]:
        """W and U."""
        of_state, of_values = self.room(), self.room()
        with on_device_of(self.k):
            prepare_kernel[(self.segments * self.chunks,)](
                self.k, self.v, self.k if self.strength is None else self.strength, self.bounds, of_state, of_values,
                *self.k.stride()[:3], *self.v.stride()[:3], *self.covered, *self.places,
                **self.sizes, WEIGHTED=self.strength is not None, **self.tiles("prepare").options,
            )  # fmt: skip
        return of_state, of_values

    def maps(self, of_state: Tensor, of_values: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """G `[b, written, g, d, d]` and B `[b, slots, g, d, d]` of every segment."""
        written, tiles = self.covered[2], self.tiles("map")
        grams, additions = (
            torch.empty(self.batch, number, self.groups, self.dim, self.dim, dtype=torch.float32, device=self.k.device)
            for number in (written, slots)
        )
        with on_device_of(self.k):
            map_kernel[(self.segments, 2 * tiles.wide_blocks)](
                self.k, of_state, of_values, self.bounds, grams, additions, *self.k.stride()[:3], *self.covered, slots, *self.places,
                **self.sizes, BV=tiles.BV, **tiles.options,
            )  # fmt: skip
        return grams, additions

    def back(self, of_state: Tensor, of_values: Tensor, before: Tensor, d_after: Tensor) -> Tensor:
        """Puts dW and dU into the places of W and U, and gives the gradient of the keys beside them."""
        changes, d_keys = self.room(), self.room()
        with on_device_of(self.k):
            chunks_backward_kernel[(self.segments,)](
                self.k, of_state, of_values, self.bounds, before, d_after, changes, d_keys,
                *self.k.stride()[:3], *self.covered, before.shape[1], *self.places, **self.sizes, **self.tiles("chunks_backward").options,
            )  # fmt: skip
        return d_keys

    def prepare_back(self, d_state: Tensor, d_values: Tensor, d_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv and the gradient of the strengths."""
        length, _, written = self.covered
        new = torch.empty if written * self.places[1] == length and not self.ragged else torch.zeros
        dk, dv = (new(self.k.shape, dtype=x.dtype, device=x.device) for x in (self.k, self.v))
        d_strength = new(self.k.shape[:3] if self.strength is not None else 0, dtype=torch.float32, device=self.k.device)
        with on_device_of(self.k):
            prepare_backward_kernel[(self.segments * self.chunks,)](
                self.k, self.v, self.k if self.strength is None else self.strength, self.bounds,
                d_state, d_values, d_keys, dk, dv, d_strength,
                *self.k.stride()[:3], *self.v.stride()[:3], *dk.stride()[:3], *self.covered, *self.places,
                **self.sizes, WEIGHTED=self.strength is not None, **self.tiles("prepare_backward").options,
            )  # fmt: skip
        return dk, dv, d_strength


@torch.library.custom_op("infini::write_deltanet", mutates_args=())
def write_deltanet(
    k: Tensor, v: Tensor, strength: Tensor | None, matrix: Tensor, offset: int, written: int, slots: int, segment_length: int,
    bounds: Tensor | None = None, fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write token after token, segment after segment: `memory.write_segments` under `deltanet`.

    Args:
        k, v, strength, matrix, offset, written, slots, segment_length, bounds, fresh: as of `write_linear`; keys are made unit keys
            here.

    Returns:
        M `[b, slots, g, d, d]` before each segment, M after the last written one, and G `[b, written, g, d, d]` of each segment,
        which its gradient needs.
    """
    chunks = Chunks(k, v, strength, offset, written, segment_length, bounds)
    grams, additions = chunks.maps(*chunks.prepare(), slots)
    before, after = affine_scan(additions, grams, matrix, written, in_place=True, fresh=as_bytes(fresh))
    return before, after, grams


@write_deltanet.register_fake
def _(k, v, strength, matrix, offset, written, slots, segment_length, bounds=None, fresh=None):
    batch, _, groups, dim = k.shape
    return (
        matrix.new_empty(batch, slots, groups, dim, dim),
        matrix.new_empty(batch, groups, dim, dim),
        matrix.new_empty(batch, written, groups, dim, dim),
    )


@torch.library.custom_op("infini::write_deltanet_backward", mutates_args=())
def write_deltanet_backward(
    k: Tensor, v: Tensor, strength: Tensor | None, before: Tensor, grams: Tensor, d_before: Tensor, d_after: Tensor,
    offset: int, written: int, segment_length: int, bounds: Tensor | None = None, fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v, strength (empty where there was None) and matrix."""
    chunks = Chunks(k, v, strength, offset, written, segment_length, bounds)
    d_matrices, d_matrix = affine_scan(
        d_before.contiguous(), grams.contiguous(), d_after, before.shape[1], reverse=True, transposed=True, fresh=as_bytes(fresh)
    )
    of_state, of_values = chunks.prepare()
    d_keys = chunks.back(of_state, of_values, before.contiguous(), d_matrices)
    return *chunks.prepare_back(of_state, of_values, d_keys), d_matrix


@write_deltanet_backward.register_fake
def _(k, v, strength, before, grams, d_before, d_after, offset, written, segment_length, bounds=None, fresh=None):
    return (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        d_after.new_empty(0 if strength is None else k.shape[:3]),
        d_after.new_empty(d_after.shape),
    )


def _save(ctx, inputs, output):
    k, v, strength, _, ctx.offset, ctx.written, _, ctx.segment_length, bounds, fresh = inputs
    ctx.save_for_backward(k, v, strength, output[0], output[2], bounds, fresh)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_before, d_after, _):
    *saved, bounds, fresh = ctx.saved_tensors
    dk, dv, d_strength, d_matrix = write_deltanet_backward(
        *saved, d_before, d_after, ctx.offset, ctx.written, ctx.segment_length, bounds, fresh
    )
    return dk, dv, None if saved[2] is None else d_strength, d_matrix, *[None] * 6


write_deltanet.register_autograd(_backward, setup_context=_save)
