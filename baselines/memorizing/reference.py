"""Memorizing Transformers (arXiv:2203.08913), one function per equation, in fp64: the oracle of the tests.

One head of one document unless said otherwise. Loops, no options, torch only, differentiable. The cache and the rotary scores are
those of `baselines.transformer_xl.reference`.
"""

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Section 3.2: queries and keys are normalised, so that old keys stay comparable with new queries."""
    return x / torch.linalg.vector_norm(x)


def entries(t: int, segment_length: int, memory_size: int) -> range:
    """Section 3.1: what the memory holds when token t's segment is read: first in, first out, the tokens before the segment."""
    start = t // segment_length * segment_length
    return range(max(0, start - memory_size), start)


def nearest(q: Tensor, keys: Tensor, top_k: int) -> list[int]:
    """Section 3.1: the indices of the `top_k` largest q.k, found by comparing all; fewer if there are fewer."""
    scores = [(q @ k).item() for k in keys]
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]


def retrieved(q: Tensor, keys: Tensor, values: Tensor, scale: Tensor, top_k: int) -> Tensor:
    """Section 3.1: V_m, softmax attention over the retrieved pairs alone; no gradient into the memory."""
    keys, values = keys.detach(), values.detach()
    chosen = nearest(q, keys, top_k)
    weight = torch.softmax(torch.stack([scale * (q @ keys[i]) for i in chosen]), dim=0)
    return sum(weight[n] * values[i] for n, i in enumerate(chosen))


def mix(beta: Tensor, V_m: Tensor, V_c: Tensor) -> Tensor:
    """Section 3.2: V_a = g V_m + (1 - g) V_c with g = sigmoid(beta), one beta per head."""
    g = torch.sigmoid(beta)
    return g * V_m + (1 - g) * V_c
