"""The gated delta rule in chunks, in plain PyTorch, for any device.

Inside a chunk of n tokens after the matrix M, let c_i be the sum of the log decays up to token i and d_ij that from j + 1 to i. What
the tokens write is D = U - W M, with [W U] = (I + strictly_lower(b exp(d_ij) K K^T))^-1 b [exp(c) K, V] (the WY form of
arXiv:2412.06464, section 3.3). A chunk is the affine map M -> exp(c_n) M + (exp(d_nj) K)^T D: all maps at once, then a scan of one
small product a chunk. Only sums of log decays are taken, never differences: all exponents are at most 0, and a decay of
exp(-100) costs its neighbors no digits.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infini.memory import unit_lower_inverse

# Tokens of a chunk: the products inside cost chunk^2, the maps between chunks d_k^2.
CHUNK = 64
# Of the norm of queries and keys: that of flash-linear-attention, so that both compute the same.
UNIT_EPS = 1e-6


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    strength: Tensor,
    initial: Tensor | None = None,
    begins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write and read token by token: M_t = alpha_t (I - beta_t k k^T) M_{t-1} + beta_t k v^T, then o_t = q M_t, with k and q made unit.

    Equation (10) of arXiv:2412.06464 with M the transpose of its S. Computed in fp32, or in fp64 where `v` is fp64.

    Args:
        q, k: `[batch, tokens, heads, d_k]`, of any length.
        v: `[batch, tokens, heads, d_v]`.
        log_decay: log alpha, at most 0, `[batch, tokens, heads]`.
        strength: beta in [0, 1], `[batch, tokens, heads]`. With log decay 0 and strength 0 a token changes nothing.
        initial: the matrix before the first token, `[batch, heads, d_k, d_v]`; None: zeros.
        begins: bool `[batch, tokens]`, True where the matrix is emptied before the token. None: nowhere.

    Returns:
        o `[batch, tokens, heads, d_v]` and the matrix after the last token `[batch, heads, d_k, d_v]`, both in the dtype of the
        computation.

    Example:
        >>> key, value = torch.ones(1, 2, 1, 1), torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)  # two values of one key
        >>> always = torch.ones(1, 2, 1)
        >>> gated_delta_rule(key, key, value, 0 * always, always)[1].round().item()  # the second replaces the first
        5.0
    """
    dtype, tokens = torch.promote_types(torch.float32, v.dtype), q.shape[1]
    if initial is None:
        initial = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1])
    q, k, v, log_decay, strength, initial = (x.to(dtype) for x in (q, k, v, log_decay, strength, initial))
    chunk = min(CHUNK, tokens)
    fill = -tokens % chunk

    def chunked(x: Tensor) -> Tensor:
        return rearrange(F.pad(x, (0, 0, 0, 0, 0, fill)), "b (c n) h d -> b h c n d", n=chunk)

    q, k, v, log_decay, b = (chunked(x) for x in (_unit(q), _unit(k), v, log_decay.unsqueeze(-1), strength.unsqueeze(-1)))
    before = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # d_ij as the sum over t of the entries [t, j] with j < t <= i.
    decays = (log_decay * before.tril(-1)).cumsum(dim=-2).exp()
    entering = log_decay.cumsum(dim=-2).exp()
    if begins is None:
        decays = decays * before
    else:
        document = rearrange(F.pad(begins.to(q.device).long(), (0, fill)), "b (c n) -> b 1 c n 1", n=chunk).cumsum(dim=-2)
        decays = decays * (before & (document == document.transpose(-1, -2)))
        entering = entering * (document == 0)

    inverse = unit_lower_inverse(b * decays * (k @ k.transpose(-1, -2)))
    from_matrix, from_values = (inverse @ (b * torch.cat([entering * k, v], dim=-1))).split([k.shape[-1], v.shape[-1]], dim=-1)
    leaving = (k * decays[..., -1, :].unsqueeze(-1)).transpose(-1, -2)
    kept = torch.eye(k.shape[-1], dtype=dtype, device=q.device) * entering[..., -1:, :]
    matrices, last = _scan(kept - leaving @ from_matrix, leaving @ from_values, initial)
    written = from_values - from_matrix @ matrices
    o = (entering * q) @ matrices + (decays * (q @ k.transpose(-1, -2))) @ written
    return rearrange(o, "b h c n d -> b (c n) h d")[:, :tokens], last


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(dim=-1, keepdim=True) + UNIT_EPS).rsqrt()


def _scan(maps: Tensor, additions: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """M_c = A_c M_{c-1} + B_c over axis 2: all M_{c-1}, and the last M_c."""
    before = []
    # unbind, not indices: the gradient of an index is as large as the whole tensor, once for every chunk.
    for A, B in zip(maps.unbind(dim=2), additions.unbind(dim=2), strict=True):
        before.append(M)
        M = A @ M + B
    return torch.stack(before, dim=2), M
