"""The compressive memory in plain PyTorch: feature maps, read, write rules, mix; batched over segments.

Pure functions, tensors in and tensors out. Axes: b batch, s segments, n tokens of one segment, h query heads,
g key/value heads (h = g r), k key features, v value width. Activations are `[b, s, n, heads, dim]`, one memory is
`[b, g, k, v]`, the memories before each segment are `[b, s, g, k, v]`. Everything is computed in fp32, or in fp64 where
the inputs are fp64: a memory in 16 bit stops growing after some thousand tokens, so it is refused.

Every write rule but `gamma_delta`'s normalizer is affine in the memory, M_s = A_s M_{s-1} + B_s. So all A_s and B_s are
computed at once, and one short scan over segments gives the memory before every segment.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini.config import FEATURE_MAPS, UPDATE_RULES
from infini.errors import InputError

DPFP_NU = 3

# A denominator sigma(q).z below this is treated as this. Far under any value that a trained model produces, and its
# square is still a normal fp32 number, which the gradient needs.
DENOMINATOR_FLOOR = 1e-12

# Tokens of a DeltaNet chunk: the inverse inside costs chunk^2 log2(chunk) per token, the maps between cost d_k^2.
DELTANET_CHUNK = 64


class MemoryState(NamedTuple):
    """What one layer remembers: `matrix` M `[b, g, k, v]` and `normalizer` z `[b, g, k]` (None for `deltanet`)."""

    matrix: Tensor
    normalizer: Tensor | None


def feature_map(x: Tensor, kind: str) -> Tensor:
    """Apply sigma to queries or keys `[..., d]`, giving non-negative features (`"none"` returns `x`).

    `"elu"` is ELU(x) + 1 (arXiv:2404.07143), `d` features. Written as exp(min(x, 0)) + max(x, 0): `elu(x) + 1` loses its
    digits below zero, and small features are what keeps filler out. `"dpfp"` is DPFP-3 (arXiv:2102.11174), `6 d`.

    Example:
        >>> feature_map(torch.tensor([-20.0]), "elu") > 0  # elu(x) + 1 in fp32 gives exactly 0 here
        tensor([True])
    """
    if kind == "elu":
        return torch.exp(x.clamp(max=0)) + F.relu(x)
    if kind == "dpfp":
        y = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
        return torch.cat([y * y.roll(j, dims=-1) for j in range(1, DPFP_NU + 1)], dim=-1)
    if kind == "none":
        return x
    raise InputError(f"feature_map is {kind!r}; choose one of {', '.join(FEATURE_MAPS)}")


def feature_size(dim: int, kind: str) -> int:
    """Number of features that `feature_map` makes of `dim` numbers."""
    return 2 * DPFP_NU * dim if kind == "dpfp" else dim


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, the keys and queries of `deltanet`."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=DENOMINATOR_FLOOR)


def retrieve(query_features: Tensor, matrix: Tensor, normalizer: Tensor | None) -> Tensor:
    """Read the memory, equation (3): sigma(Q) M / (sigma(Q) z); without a normalizer just Q M.

    Args:
        query_features: `[b, s, n, h, k]`.
        matrix: `[b, s, g, k, v]`, the memory before each segment; head `i` reads memory `i // (h // g)`.
        normalizer: `[b, s, g, k]` or None.

    Returns:
        `[b, s, n, h, v]`. An empty memory gives zeros; whether they are used is `mix`'s decision.
    """
    grouped = rearrange(query_features, "b s n (g r) k -> b s g (r n) k", g=matrix.shape[2])
    read = grouped @ matrix
    if normalizer is not None:
        read = read / (grouped @ normalizer.unsqueeze(-1)).clamp(min=DENOMINATOR_FLOOR)
    return rearrange(read, "b s g (r n) v -> b s n (g r) v", n=query_features.shape[2])


def mix(beta: Tensor, memory_output: Tensor, local_output: Tensor, has_memory: Tensor | None) -> Tensor:
    """Gate the two outputs, equation (6): w memory_output + (1 - w) local_output, w = sigmoid(beta).

    Args:
        beta: gate logits `[h]`; w = 1 is all memory.
        memory_output, local_output: `[b, s, n, h, v]`.
        has_memory: bool `[b, s]`; where False the local output is returned whole. None: mix everywhere.

    Example:
        >>> local, memory = torch.ones(1, 1, 1, 2, 3), torch.zeros(1, 1, 1, 2, 3)
        >>> out = mix(torch.zeros(2), memory, local, torch.tensor([[False]]))
        >>> torch.equal(out, local)  # nothing has been written yet: local attention is left whole
        True
    """
    memory_weight = torch.sigmoid(beta)[:, None]
    mixed = memory_weight * memory_output + (1 - memory_weight) * local_output
    if has_memory is None:
        return mixed
    return torch.where(has_memory[:, :, None, None, None], mixed, local_output)


def write_segments(
    update_rule: str,
    initial: MemoryState,
    key_features: Tensor,
    write_strength: Tensor | None,
    values: Tensor,
    written: Tensor | None = None,
    fresh: Tensor | None = None,
    has_memory: Tensor | None = None,
) -> tuple[MemoryState, MemoryState]:
    """Write segment after segment; give the memory before each segment and the one after the last.

    | rule | matrix | normalizer |
    |---|---|---|
    | `linear` | M + sum f v^T | z + sum f |
    | `delta` | M + sum f (v - sigma(k) M / (sigma(k) z))^T | z + sum f |
    | `gamma_delta` | as `delta` | z + sum c f, c = clip(1 - z.f / abs(f)^2, 0, 1), no gradient, 1 while empty |
    | `deltanet` | token by token M + w k (v - k M)^T, unit keys | none |

    with f = w sigma(k). Linear and delta are equations (4) and (5) of arXiv:2404.07143, `gamma_delta` is arXiv:2407.04841,
    `deltanet` arXiv:2406.06484 in its chunkwise form. Except in `deltanet`, all tokens of a segment see the old memory.

    Args:
        update_rule: one of `UPDATE_RULES`.
        initial: the memory before the first segment, fp32 or fp64.
        key_features: sigma(K), or unit keys for `deltanet`, `[b, s, n, g, k]`.
        write_strength: w in [0, 1], `[b, s, n, g]`; None means 1 (the paper).
        values: `[b, s, n, g, v]`.
        written: bool `[b, s]`, False for segments that are not full and so are not written. None: all are.
        fresh: bool `[b, s]`, True where a document begins and the memory is emptied first. None: nowhere.
        has_memory: bool `[b, s]`, whether anything was written since the document began. None: everywhere.

    Returns:
        `(before, after)`: MemoryStates `[b, s, g, k, v]` / `[b, s, g, k]`, and `[b, g, k, v]` / `[b, g, k]`.

    Raises:
        InputError: the memory is a 16-bit float, or the rule is unknown.

    Cost: 2 b s n g k v FLOP for the sums, as much again in `k k` for A_s (delta), fp32 state of 4 b s g k (v + 1) bytes.

    Example:
        >>> key, value = torch.ones(1, 2, 1, 1, 1), torch.full((1, 2, 1, 1, 1), 3.0)  # the same pair in two segments
        >>> empty = MemoryState(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
        >>> has = torch.tensor([[False, True]])
        >>> _, after = write_segments("delta", empty, key, None, value, has_memory=has)
        >>> (after.matrix / after.normalizer).item()  # published delta: z counts the pair twice, M holds it once
        1.5
    """
    before, after, _ = _write(update_rule, initial, key_features, write_strength, values, written, fresh, has_memory)
    return before, after


def write_segments_with_map(
    update_rule: str,
    initial: MemoryState,
    key_features: Tensor,
    write_strength: Tensor | None,
    values: Tensor,
    written: Tensor | None = None,
    fresh: Tensor | None = None,
    has_memory: Tensor | None = None,
) -> tuple[MemoryState, MemoryState, Tensor | None]:
    """`write_segments`, and how much of the memory before all segments is still there after them.

    What was written falls together with what it overwrote into one affine map, M_after = A M_before + B, where
    A = A_S ... A_2 A_1 is the product of the scan's own maps. A depends on keys and strengths, and through the normalizer of
    the delta rules on the keys before; not on values.

    Args:
        As in `write_segments`.

    Returns:
        `(before, after, A)` with A `[b, g, k, k]`, or None for the identity, which it is in `linear` without documents that
        begin. A row of the batch in which a document begins keeps nothing: A = 0.

    Cost: the scan's maps once more, 2 b s g k^3 FLOP.

    Example:
        >>> key, value = torch.eye(2)[None, None, :1, None], torch.ones(1, 1, 1, 1, 3)  # one token, one head
        >>> full = MemoryState(torch.ones(1, 1, 2, 3), None)
        >>> write_segments_with_map("deltanet", full, key, None, value)[2]  # what stood under the first key is replaced
        tensor([[[[0., 0.],
                  [0., 1.]]]])
    """
    before, after, maps = _write(update_rule, initial, key_features, write_strength, values, written, fresh, has_memory)
    return before, after, _product(maps, initial, fresh)


def _write(
    update_rule: str,
    initial: MemoryState,
    key_features: Tensor,
    write_strength: Tensor | None,
    values: Tensor,
    written: Tensor | None,
    fresh: Tensor | None,
    has_memory: Tensor | None,
) -> tuple[MemoryState, MemoryState, Tensor | None]:
    """Before, after, and the scan's maps `[b, s, g, k, k]`; None where all are I."""
    _refuse_16_bit(initial)
    if update_rule not in UPDATE_RULES:
        raise InputError(f"update_rule is {update_rule!r}; choose one of {', '.join(UPDATE_RULES)}")
    strength = torch.ones_like(key_features[..., 0]) if write_strength is None else write_strength
    if written is not None:
        # A segment written with strength 0 is not written: A = I and B = 0 in every rule.
        strength = strength * written[:, :, None, None]
    # Bring tokens next to features, so that every product below is one batched matrix product.
    sigma = rearrange(key_features, "b s n g k -> b s g n k")
    values = rearrange(values, "b s n g v -> b s g n v")
    strength = rearrange(strength, "b s n g -> b s g n 1")
    if update_rule == "deltanet":
        return _write_deltanet(initial, sigma, strength, values, fresh)

    features = strength * sigma
    additions = features.transpose(-1, -2) @ values
    if update_rule == "gamma_delta":
        normalizers, z_after = _scan_gamma_normalizer(initial.normalizer, features, fresh, has_memory)
    else:
        normalizers, z_after = _scan(None, features.sum(dim=-2), initial.normalizer, fresh)
    maps = None
    if update_rule != "linear":
        # v_old = sigma M / (sigma z), so A = I - f^T (sigma / (sigma z)); an empty memory holds no old value: A = I.
        predicted = sigma / (sigma @ normalizers.unsqueeze(-1)).clamp(min=DENOMINATOR_FLOOR)
        if has_memory is not None:
            predicted = predicted * has_memory[:, :, None, None, None]
        maps = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device) - features.transpose(-1, -2) @ predicted
    matrices, M_after = _scan(maps, additions, initial.matrix, fresh)
    return MemoryState(matrices, normalizers), MemoryState(M_after, z_after), maps


def _product(maps: Tensor | None, initial: MemoryState, fresh: Tensor | None) -> Tensor | None:
    """A_S ... A_2 A_1 of the maps `[b, s, g, k, k]`, neighbors first, so that few large products do it."""
    if maps is None and fresh is not None:
        matrix = initial.matrix
        maps = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:2], -1, -1)[:, None]
    while maps is not None and maps.shape[1] > 1:
        pairs = maps.shape[1] // 2 * 2
        maps = torch.cat([maps[:, 1:pairs:2] @ maps[:, :pairs:2], maps[:, pairs:]], dim=1)
    if maps is None or fresh is None:
        return None if maps is None else maps[:, 0]
    return maps[:, 0].masked_fill(fresh.any(dim=1)[:, None, None, None], 0)


def _scan(
    maps: Tensor | None, additions: Tensor, initial: Tensor, fresh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_s = A_s x_{s-1} + B_s over axis 1, with x emptied where `fresh`: all x_{s-1} and the last x_s."""
    if maps is None and fresh is None:
        # Without maps and resets the scan is a prefix sum.
        sums = torch.cat([initial.unsqueeze(1), additions], dim=1).cumsum(dim=1)
        return sums[:, :-1], sums[:, -1]
    before, x = [], initial
    # unbind, not indices: the gradient of an index is as large as the whole tensor, once for every segment.
    every_map = [None] * additions.shape[1] if maps is None else maps.unbind(dim=1)
    for s, (addition, segment_map) in enumerate(zip(additions.unbind(dim=1), every_map, strict=True)):
        if fresh is not None:
            # where, not a product: what is dropped may be infinite.
            x = torch.where(fresh[:, s].reshape(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)
        before.append(x)
        x = addition + (x if segment_map is None else segment_map @ x)
    return torch.stack(before, dim=1), x


def _scan_gamma_normalizer(
    initial: Tensor, features: Tensor, fresh: Tensor | None, has_memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The normalizer of `gamma_delta`: not affine in z, so it goes one segment after the other."""
    squared = features.square().sum(dim=-1).clamp(min=torch.finfo(features.dtype).tiny)
    before, z = [], initial
    for s in range(features.shape[1]):
        if fresh is not None:
            z = torch.where(fresh[:, s, None, None], torch.zeros_like(z), z)
        before.append(z)
        f = features[:, s]
        with torch.no_grad():
            new_part = (1 - (f @ z.unsqueeze(-1)).squeeze(-1) / squared[:, s]).clamp(0, 1)
            if has_memory is not None:
                new_part = torch.where(has_memory[:, s, None, None], new_part, torch.ones_like(new_part))
        z = z + (new_part.unsqueeze(-1) * f).sum(dim=-2)
    return torch.stack(before, dim=1), z


def _write_deltanet(
    initial: MemoryState, keys: Tensor, strength: Tensor, values: Tensor, fresh: Tensor | None
) -> tuple[MemoryState, MemoryState, Tensor]:
    """DeltaNet's token-by-token delta in chunks (WY form, arXiv:2406.06484).

    Within a chunk the writes are U - W M with [W U] = (I + strictly_lower(w K K^T))^-1 w [K V], so a chunk is the affine
    map M -> M + K^T (U - W M). A segment's map [A B] comes of sending [I 0] through its chunks, in all segments at once.
    Tokens that fill up the last chunk have strength 0 and change nothing.
    """
    tokens, features = keys.shape[3:]
    chunk = min(DELTANET_CHUNK, tokens)
    if fill := -tokens % chunk:
        keys, values, strength = (F.pad(x, (0, 0, 0, fill)) for x in (keys, values, strength))
    keys, values, strength = (
        rearrange(x, "b s g (c n) k -> b s g c n k", n=chunk) for x in (keys, values, strength)
    )
    inverse = unit_lower_inverse(strength * (keys @ keys.transpose(-1, -2)))
    # [-W U], so that a chunk's change of [I 0] is K^T [-W U], and that of [A B] is K^T ([0 U] + (-W) [A B]).
    solved = inverse @ (strength * torch.cat([-keys, values], dim=-1))
    carried = F.pad(torch.eye(features, dtype=keys.dtype, device=keys.device), (0, values.shape[-1]))
    for c, (key, change) in enumerate(zip(keys.unbind(dim=3), solved.unbind(dim=3), strict=True)):
        if c > 0:
            change = F.pad(change[..., features:], (features, 0)) + change[..., :features] @ carried
        carried = carried + key.transpose(-1, -2) @ change
    maps, additions = carried.split([features, values.shape[-1]], dim=-1)
    before, after = _scan(maps, additions, initial.matrix, fresh)
    return MemoryState(before, None), MemoryState(after, None), maps


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 of `[..., n, n]` for the entries L below the diagonal, in 2 log2(n) batched matrix products.

    The inverses of neighboring diagonal blocks of m rows, T_1 and T_2, make that of 2 m rows: -T_2 L_21 T_1 stands below
    them. All blocks take the step at once, in full products of which the rest is zeros. For unit keys and strengths up to 1
    every T and every L_21 T_1 is at most 1 in size, also where keys repeat; the powers of L, whose series is shorter to
    write, would overflow there.
    """
    return _UnitLowerInverse.apply(lower)


class _UnitLowerInverse(torch.autograd.Function):
    """Keeps the inverse alone for the backward pass: dT = -T dL T."""

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        place = torch.arange(lower.shape[-1], device=lower.device)
        # i and j stand in the two halves of one block of 2 m rows where m is the highest bit in which they differ.
        apart = place[:, None] ^ place
        inverse = torch.eye(len(place), dtype=lower.dtype, device=lower.device) - (lower * (apart == 1)).tril(-1)
        m = 2
        while m < len(place):
            between = lower * ((apart >= m) & (apart < 2 * m)).tril(-1)
            inverse = inverse - inverse @ between @ inverse
            m *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ gradient @ transposed).tril(-1)


def _refuse_16_bit(state: MemoryState) -> None:
    for name, tensor in zip(MemoryState._fields, state, strict=True):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the memory's {name} is {tensor.dtype}; a memory must be float32 or float64, because a long sum in 16 bit "
                "stops growing. Convert it with .float()"
            )
