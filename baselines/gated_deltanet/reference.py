"""Gated DeltaNet, one function per equation, in fp64: the oracle of the tests.

One head of one document: `q` and `k` are `[tokens, d_k]`, `v` is `[tokens, d_v]`, the matrix `M` `[d_k, d_v]` is the transpose of
the paper's S. Loops, no options, torch only, differentiable.
"""

import torch
from torch import Tensor


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """The short convolution: y_t = sum_i w_i * x_{t - i} for each channel; x `[tokens, c]`, weight `[size, c]`."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for i in range(min(len(weight), t + 1)):
            y = y + weight[i] * x[t - i]
        rows.append(y)
    return torch.stack(rows)


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| for one query or key; eps as in the authors' code."""
    return x / torch.sqrt((x**2).sum() + eps)


def decay(a: Tensor, log_rate: Tensor, time_bias: Tensor) -> Tensor:
    """alpha = exp(-A softplus(a + b)) with A = exp(log_rate), in (0, 1): Mamba2's (arXiv:2405.21060)."""
    return torch.exp(-torch.exp(log_rate) * torch.log(1 + torch.exp(a + time_bias)))


def write(M: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule, equation (10): S = S (alpha (I - beta k k^T)) + beta v k^T, here of M = S^T; |k| = 1."""
    erased = M - beta * torch.outer(k, k @ M)
    return alpha * erased + beta * torch.outer(k, v)


def recur(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token: write, then read o = M^T q; `alpha` and `beta` are `[tokens]`. Gives `[tokens, d_v]` and the last M."""
    rows = []
    for t in range(len(q)):
        M = write(M, unit(k[t]), v[t], alpha[t], beta[t])
        rows.append(unit(q[t]) @ M)
    return torch.stack(rows), M


def gated(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What goes to the output projection: RMSNorm(o) silu(gate), for each head."""
    return o / torch.sqrt((o**2).mean(dim=-1, keepdim=True) + eps) * weight * silu(gate)
