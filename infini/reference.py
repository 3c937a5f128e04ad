"""The algorithm, one function per equation, in fp64: the oracle that everything else is compared with.

Infini-attention (arXiv:2404.07143), for one head of one sequence unless said otherwise. `q` and `k` are
`[tokens, d_k]`, `v` is `[tokens, d_v]`, the memory `M` is `[d_k, d_v]` and its normalizer `z` is `[d_k]`.
Loops, no options, torch only, differentiable. Nothing in the library runs on this file: tests and benchmarks do.
"""

import math

import torch
from torch import Tensor


def local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of one segment, equation (2): A_dot = softmax(Q K^T / sqrt(d_k)) V."""
    rows = []
    for t in range(len(q)):
        scores = k[: t + 1] @ q[t] / math.sqrt(q.shape[-1])
        rows.append(torch.softmax(scores, dim=0) @ v[: t + 1])
    return torch.stack(rows)


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal softmax attention of a whole document in which each token sees the last `window` tokens, itself included."""
    rows = []
    for t in range(len(q)):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = k[seen] @ q[t] / math.sqrt(q.shape[-1])
        rows.append(torch.softmax(scores, dim=0) @ v[seen])
    return torch.stack(rows)


def elu_plus_one(x: Tensor) -> Tensor:
    """sigma(x) = ELU(x) + 1: x + 1 above zero, exp(x) below."""
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """Deterministic parameter-free projection (arXiv:2102.11174, eq. 37): `d` to `2 nu d` sparse non-negative features."""
    y = torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)
    return torch.cat([y * torch.roll(y, shifts=j, dims=-1) for j in range(1, nu + 1)], dim=-1)


def retrieve(query_features: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """Read of the memory, equation (3): A_mem = sigma(Q) M / (sigma(Q) z)."""
    return torch.stack([(g @ M) / (g @ z) for g in query_features])


def update_linear(key_features: Tensor, w: Tensor, v: Tensor, M: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Linear write, equation (4): M + sum w sigma(k) v^T and z + sum w sigma(k); `w` is 1 in the paper."""
    for t in range(len(v)):
        M = M + w[t] * torch.outer(key_features[t], v[t])
        z = z + w[t] * key_features[t]
    return M, z


def update_delta(
    key_features: Tensor, w: Tensor, v: Tensor, M: Tensor, z: Tensor, empty: bool
) -> tuple[Tensor, Tensor]:
    """Delta write, equation (5): M + sum w sigma(k) (v - sigma(k) M / (sigma(k) z))^T, z as in equation (4).

    Every token of the segment is compared with the same old memory. An empty memory holds no old value.
    """
    M_new, z_new = M, z
    for t in range(len(v)):
        v_old = torch.zeros_like(v[t]) if empty else (key_features[t] @ M) / (key_features[t] @ z)
        M_new = M_new + w[t] * torch.outer(key_features[t], v[t] - v_old)
        z_new = z_new + w[t] * key_features[t]
    return M_new, z_new


def update_gamma_delta(
    key_features: Tensor, w: Tensor, v: Tensor, M: Tensor, z: Tensor, empty: bool
) -> tuple[Tensor, Tensor]:
    """Delta write whose normalizer grows only by the new part of a key (ARMT, arXiv:2407.04841).

    With f = w sigma(k): z + sum c f, where c = clip(1 - z.f / |f|^2, 0, 1) carries no gradient and is 1 while empty.
    """
    M_new, _ = update_delta(key_features, w, v, M, z, empty)
    z_new = z
    for t in range(len(v)):
        f = w[t] * key_features[t]
        c = torch.ones(()) if empty else torch.clamp(1 - (z @ f) / (f @ f), 0, 1).detach()
        z_new = z_new + c * f
    return M_new, z_new


def update_deltanet(k: Tensor, w: Tensor, v: Tensor, M: Tensor) -> Tensor:
    """Token-by-token delta write with unit keys and no normalizer (DeltaNet, arXiv:2406.06484).

    M_t = M_{t-1} + w k^ (v - k^ M_{t-1})^T with k^ = k / |k|. Not equation (5): here each token sees the writes before it.
    """
    for t in range(len(v)):
        unit = k[t] / torch.linalg.vector_norm(k[t])
        M = M + w[t] * torch.outer(unit, v[t] - unit @ M)
    return M


def retrieve_deltanet(q: Tensor, M: Tensor, eps: float = 1e-6) -> Tensor:
    """Read of the DeltaNet memory: q^ M, then divided by its root mean square (no learned scale)."""
    read = torch.stack([(row / torch.linalg.vector_norm(row)) @ M for row in q])
    return read / torch.sqrt((read**2).mean(dim=-1, keepdim=True) + eps)


def gate(beta: Tensor, memory_output: Tensor, local_output: Tensor) -> Tensor:
    """Mix, equation (6): A = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot. One beta per query head."""
    memory_weight = torch.sigmoid(beta)
    return memory_weight * memory_output + (1 - memory_weight) * local_output


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    segment_length: int,
    update_rule: str,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run Infini-attention over a whole sequence, segment after segment (equations 2 to 6).

    Every segment reads the memory of the segments before it, attends to itself, and is then written. A last segment that
    is not full is attended and read for, and not written. While the memory is empty the output is the local one, whole.

    Args:
        q: queries `[batch, tokens, heads, d_k]`, computed in fp64 whatever the dtype.
        k: keys `[batch, tokens, kv_heads, d_k]`; query head i uses key/value head `i // (heads // kv_heads)`.
        v: values `[batch, tokens, kv_heads, d_v]`.
        beta: gate logits `[heads]`.
        segment_length: tokens per segment.
        update_rule: `"linear"` (equation 4) or `"delta"` (equation 5).
        state: `(M, z)` of an earlier call, `[batch, kv_heads, d_k, d_v]` and `[batch, kv_heads, d_k]`; None while
            nothing has been written.

    Returns:
        The output `[batch, tokens, heads, d_v]` in fp64 and the state `(M, z)` after the last full segment.

    Example:
        >>> x = torch.randn(1, 6, 2, 4)
        >>> whole, _ = infini_attention(x, x, x, torch.zeros(2), 2, "linear")
        >>> first, state = infini_attention(x[:, :4], x[:, :4], x[:, :4], torch.zeros(2), 2, "linear")
        >>> rest, _ = infini_attention(x[:, 4:], x[:, 4:], x[:, 4:], torch.zeros(2), 2, "linear", state)
        >>> torch.equal(whole, torch.cat([first, rest], dim=1))  # the state is all that crosses a segment border
        True
    """
    q, k, v, beta = q.double(), k.double(), v.double(), beta.double()
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    M_out = torch.zeros(batch, kv_heads, k.shape[-1], v.shape[-1], dtype=torch.float64)
    z_out = torch.zeros(batch, kv_heads, k.shape[-1], dtype=torch.float64)
    if state is not None:
        M_out, z_out = state[0].double(), state[1].double()
    output, M_rows, z_rows = [], [], []
    for b in range(batch):
        per_head: list[Tensor] = []
        for g in range(kv_heads):
            M, z, empty = M_out[b, g], z_out[b, g], state is None
            group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            pieces: dict[int, list[Tensor]] = {h: [] for h in group}
            for start in range(0, tokens, segment_length):
                now = slice(start, min(start + segment_length, tokens))
                for h in group:
                    mixed = local_attention(q[b, now, h], k[b, now, g], v[b, now, g])
                    if not empty:
                        memory_output = retrieve(elu_plus_one(q[b, now, h]), M, z)
                        mixed = gate(beta[h], memory_output, mixed)
                    pieces[h].append(mixed)
                if now.stop - now.start == segment_length:
                    ones = torch.ones(segment_length, dtype=torch.float64)
                    features = elu_plus_one(k[b, now, g])
                    if update_rule == "linear":
                        M, z = update_linear(features, ones, v[b, now, g], M, z)
                    elif update_rule == "delta":
                        M, z = update_delta(features, ones, v[b, now, g], M, z, empty)
                    else:
                        raise ValueError(f"update_rule is {update_rule!r}; the paper has 'linear' and 'delta'")
                    empty = False
            per_head += [torch.cat(pieces[h]) for h in group]
            M_rows.append(M)
            z_rows.append(z)
        output.append(torch.stack(per_head, dim=1))
    shape = (batch, kv_heads)
    return torch.stack(output), (torch.stack(M_rows).unflatten(0, shape), torch.stack(z_rows).unflatten(0, shape))
