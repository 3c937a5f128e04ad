"""Transformer-XL (arXiv:1901.02860), one function per equation, in fp64: the oracle of the tests.

One head of one document unless said otherwise. Loops, no options, torch only, differentiable.
"""

import math

import torch
from torch import Tensor


def sinusoid(distance: int, dim: int) -> Tensor:
    """R_{distance} of section 3.3, `[dim]`: sines, then cosines, of distance / 10000^(2i / dim)."""
    rows = [distance / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([math.sin(a) for a in rows] + [math.cos(a) for a in rows], dtype=torch.float64)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """`x` `[d]` with the pairs (x_i, x_{i + d/2}) turned by position / theta^(2i / d) (arXiv:2104.09864, equation 34)."""
    half = len(x) // 2
    out = [x[0]] * len(x)
    for i in range(half):
        angle = position / theta ** (i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def visible(t: int, segment_length: int, memory_length: int) -> tuple[range, range]:
    """Section 3.2: the tokens that token t sees in the cache and in its own segment."""
    start = t // segment_length * segment_length
    return range(max(0, start - memory_length), start), range(start, t + 1)


def extended(h: Tensor, t: int, segment_length: int, memory_length: int) -> Tensor:
    """Section 3.2: h~ = [SG(h_cache) ; h_segment], the hidden states `[seen, D]` that token t attends to."""
    cache, own = visible(t, segment_length, memory_length)
    return torch.cat([h[cache.start : cache.stop].detach(), h[own.start : own.stop]])


def relative_score(q: Tensor, k: Tensor, r: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A^rel of section 3.3: (a) q.k + (b) q.r + (c) u.k + (d) v.r, divided by sqrt(d); all `[d]`, r = W_{k,R} R_{i-j}."""
    return (q @ k + q @ r + u @ k + v @ r) / math.sqrt(len(q))


def rotary_score(q: Tensor, k: Tensor, i: int, j: int, theta: float) -> Tensor:
    """The modern variant's score: q and k turned by their positions, so that the distance alone counts."""
    return turned(q, i, theta) @ turned(k, j, theta) / math.sqrt(len(q))


def attention_head(
    h: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    W_v: Tensor,
    segment_length: int,
    memory_length: int,
    score,
) -> Tensor:
    """Section 3.3, one head over a document `[tokens, D]` to `[tokens, d]`.

    `W_q`, `W_k`, `W_v` are `[d, D]`; `score(q, k, i, j)` is one of the two scores above with its parameters filled in.
    """
    rows = []
    for t in range(len(h)):
        seen = extended(h, t, segment_length, memory_length)
        q, k, v = W_q @ h[t], seen @ W_k.T, seen @ W_v.T
        first = t + 1 - len(seen)
        scores = torch.stack([score(q, k[j], t, first + j) for j in range(len(seen))])
        rows.append(torch.softmax(scores, dim=0) @ v)
    return torch.stack(rows)
