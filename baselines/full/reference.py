"""Plain causal attention, one function per equation, in fp64: the oracle of the tests.

One head of one document. Loops, no options, torch only, differentiable.
"""

import math

import torch
from torch import Tensor


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """`x` `[d]` with the pairs (x_i, x_{i + d/2}) turned by position / theta^(2i / d) (arXiv:2104.09864, equation 34)."""
    half = len(x) // 2
    out = [x[0]] * len(x)
    for i in range(half):
        angle = position / theta ** (i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def visible(t: int, window: int) -> range:
    """The tokens that token t sees: the last `window`, itself included (the text's length: all of them)."""
    return range(max(0, t - window + 1), t + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, theta: float) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V (arXiv:1706.03762, equation 1) over the visible tokens, `[tokens, d]`."""
    rows = []
    for t in range(len(q)):
        here = turned(q[t], t, theta)
        scores = torch.stack([here @ turned(k[j], j, theta) for j in visible(t, window)]) / math.sqrt(q.shape[-1])
        rows.append(torch.softmax(scores, dim=0) @ v[visible(t, window).start : t + 1])
    return torch.stack(rows)
