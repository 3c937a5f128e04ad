"""Attention over a segment and its cache, with relative or rotary positions."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from baselines.block import Heads
from baselines.cache import CachePlan, Table, cached_attention
from baselines.config import DecoderConfig
from baselines.transformer_xl.state import CacheLayer
from infini.compiled import Part
from infini.layers.rotary import rotate


class CachedAttention(Heads):
    """One attention layer of arXiv:1901.02860, over any number of segments.

    Parameters beside those of `Heads`: with relative positions r_proj `[h d, D]`, W_{k,R} of the paper. u and v are the model's.
    """

    def __init__(self, config: DecoderConfig, relative: bool):
        super().__init__(config)
        self.project, self.turn = Part(project, (), *[(0, 1)] * 4), Part(rotate, (0, 1, 2), (0,), (0,))
        if relative:
            self.r_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)

    def forward(
        self, x: Tensor, state: CacheLayer | None, plan: CachePlan, positions, biases, use_cache: bool
    ) -> tuple[Tensor, CacheLayer]:
        """Attend `x` `[batch, tokens, D]` after `state`.

        Args:
            x: what the layer reads.
            state: what the layer carried so far; None at the start (then `plan.history` is 0).
            plan: the places of the tokens.
            positions: with rotary positions `cache_positions`' tables, with relative ones `sinusoids`.
            biases: u and v `[h, d]`; None with rotary positions.
            use_cache: False hides the cache.

        Returns:
            The layer's output `[batch, tokens, D]` and its new state.
        """
        line = line_of(state, x)
        relative = biases is not None
        here, places = ((None, None), None) if relative else positions
        q, k, v, cached_k, cached_v = self.project(self, x, line, *here)
        attended = cached_attention(
            q, k, v, cached_k, cached_v, plan,
            turn=None if relative else partial(self.turned, places),
            bias=(lambda q, keys: self._position_term(q, keys, positions, *biases)) if relative else None,
            use_cache=use_cache,
        )  # fmt: skip
        return self.o_proj(attended.flatten(2)), CacheLayer(plan.recent(line))

    def turned(self, places: Table, keys: Tensor) -> Tensor:
        """Keys `[batch, segments, keys, heads, d]` of a cache and its segment, with their rotary positions."""
        return self.turn(keys, *(part[: keys.shape[2]] for part in places))

    def _position_term(self, q: Tensor, keys: int, positions: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q + u, and ((q + v)^T W_{k,R} R_{i-j}) / sqrt(d) by the shift of the paper's appendix B."""
        dim = self.config.head_dim
        r = self.r_proj(positions[-keys:]).unflatten(-1, (-1, dim)).transpose(0, 1)  # distances keys - 1 to 0
        term = (q + v[:, None]) @ r.transpose(-1, -2).to(q.dtype)
        # Under autocast u is fp32, and so the sum would be, and with it the mask of all scores.
        return (q + u[:, None]).to(q.dtype), shift(term) / math.sqrt(dim)


def line_of(state: CacheLayer | None, x: Tensor) -> Tensor:
    """The hidden states carried, and those of `x` behind them."""
    # Never `x` itself: `project` gets both, and one tensor twice would be another graph.
    carried = x[:, :0] if state is None else state.hidden.to(x.dtype)
    return torch.cat([carried, x], dim=1)


def project(layer: Heads, x: Tensor, line: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, ...]:
    """Queries of `x`, turned by a rotary table if there is one; keys and values of the line, as their own segment sees them, and as
    a cache does.

    A cache gives no gradient to the hidden states in it: h~ = [SG(h); h]. Its keys and values are projected anew, so that the
    weights get theirs.
    """
    dim = layer.config.head_dim
    q = layer.q_proj(x).unflatten(-1, (-1, dim))
    if cos is not None:
        q = rotate(q, cos, sin)
    k, v = (proj(line).unflatten(-1, (-1, dim)) for proj in (layer.k_proj, layer.v_proj))
    if not torch.is_grad_enabled():
        return q, k, v, k, v
    stopped = line.detach()
    cached_k, cached_v = (proj(stopped).unflatten(-1, (-1, dim)) for proj in (layer.k_proj, layer.v_proj))
    return q, k, v, cached_k, cached_v


def shift(term: Tensor) -> Tensor:
    """From columns by distance, falling to 0, to columns by key: `[..., queries, keys]`; the last query is at the last key.

    What stands at keys behind their query has no meaning.

    Example:
        >>> distance = torch.tensor([[2, 1, 0]]).repeat(3, 1)
        >>> shift(distance)  # query i and key j are i - j apart
        tensor([[0, 0, 2],
                [1, 0, 0],
                [2, 1, 0]])
    """
    *rest, queries, keys = term.shape
    padded = torch.cat([term.new_zeros(*rest, queries, 1), term], dim=-1)
    return padded.reshape(*rest, keys + 1, queries)[..., 1:, :].reshape(term.shape)


def sinusoids(distances: int, dim: int, clamp: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R for the distances `distances - 1` to 0, `[distances, dim]`: sines, then cosines, of distance / 10000^(2i / dim)."""
    distance = torch.arange(distances - 1, -1, -1, dtype=torch.float64, device=device)
    if clamp is not None:
        distance = distance.clamp(max=clamp)
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :dim].to(dtype)
