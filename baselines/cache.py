"""Segments with a cache: the tokens of a segment see it causally, and the `memory_length` tokens before its first one.

Segment borders are those of the document, wherever a call ends: the state carries the open segment and the cache before it,
as one line of the last `memory_length + segment_length - 1` tokens. Shared by Transformer-XL and Memorizing Transformers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infini.layers.rotary import rotary_table
from infini.segments import SegmentPlan


class CachePlan(SegmentPlan):
    """A `SegmentPlan` that also knows which tokens stand before each segment.

    Args:
        tokens: new tokens per row.
        segment_length: n.
        memory_length: M, tokens of the cache.
        state: with counters `open_length` and `tokens_seen`; None at the start of a text.
        lengths, reset, batch, device: as in `SegmentPlan`.

    Attributes:
        before: int64 `[batch or 1, segments]` on the CPU, tokens of its document before each segment.
        document: int64, alike, which document of the call a segment belongs to: 0 is that of the state.
        committed: int64 `[batch]` on the CPU, segments of the grid before the open one that the call leaves.
        cached: bool `[batch or 1, segments, M]`, the cache's slots that hold a token; None: all.
        preceded: bool `[batch or 1, segments]`, something of the document stands before the segment; None: in all.
        any_preceded: in any.
    """

    def __init__(self, tokens, segment_length, memory_length, state, lengths, reset, batch, device):
        zeros = torch.zeros(batch, dtype=torch.long)
        opened = zeros if state is None else state.open_length
        seen = zeros if state is None else state.tokens_seen
        self.memory_length = memory_length
        self.carried = memory_length + segment_length - 1
        super().__init__(
            tokens=tokens,
            segment_length=segment_length,
            span=memory_length + segment_length,
            sliding=False,
            open_length=opened,
            tokens_seen=seen,
            empty=torch.zeros(batch, dtype=torch.bool),
            history=0 if state is None else self.carried,
            lengths=lengths,
            reset=reset,
            device=device,
        )
        if self.uniform:
            self._precede_uniform(int(opened[0]), int(seen[0]))
        else:
            self._precede_ragged(opened, seen, lengths, reset)
        slot = torch.arange(memory_length)
        cached = slot >= memory_length - self.before.clamp(max=memory_length).unsqueeze(-1)
        self.cached = None if bool(cached.all()) else self._send(cached)
        begun = self.before > 0
        self.any_preceded = bool(begun.any())
        self.preceded = None if bool(begun.all()) else self._send(begun)

    @property
    def alone(self) -> bool:
        """The call's tokens are of one segment, the same slots in every row: as in decoding, nothing need go to a grid."""
        return self.uniform and self.segments == 1

    def _precede_uniform(self, opened: int, seen: int) -> None:
        self.before = (seen - opened + self.segment_length * torch.arange(self.segments)).unsqueeze(0)
        self.document = torch.zeros_like(self.before)
        self.committed = torch.full((self.batch,), (opened + self.tokens) // self.segment_length)

    def _precede_ragged(self, opened: Tensor, seen: Tensor, lengths: Tensor | None, reset: Tensor | None) -> None:
        n, rows, place = self.segment_length, torch.arange(self.batch), torch.arange(self.tokens).expand(self.batch, -1)
        lengths = torch.full((self.batch,), self.tokens) if lengths is None else lengths
        real = place < lengths[:, None]
        reset = torch.zeros_like(real) if reset is None else reset & real
        begun = torch.where(reset, place, -1).cummax(dim=1).values
        position = torch.where(begun < 0, opened[:, None] + place, place - begun)
        continues = (opened > 0) & ~reset[:, 0]
        segment = ((position % n == 0).long().cumsum(dim=1) - 1 + continues.long()[:, None]).clamp(max=self.segments - 1)
        fresh = torch.zeros(self.batch, self.segments, dtype=torch.long).scatter_add_(1, segment, reset.long()) > 0
        index = torch.arange(self.segments)
        since = torch.where(fresh, index, -1).cummax(dim=1).values
        self.before = torch.where(since < 0, (seen - opened)[:, None] + n * index, n * (index - since))
        self.document = fresh.long().cumsum(dim=1)
        last = segment[rows, (lengths - 1).clamp(min=0)]
        self.committed = torch.where(lengths > 0, last + (self.open_length == 0).long(), 0)
        # Where in the line each segment begins; a segment without tokens begins anywhere.
        start = torch.full((self.batch, self.segments), self.history)
        start[:, 0] -= torch.where(continues, opened, 0)
        first = real & (position % n == 0)
        begins = torch.zeros(self.batch, self.segments + 1, dtype=torch.long)
        begins.scatter_(1, torch.where(first, segment, self.segments), self.history + place)
        start = torch.where(begins[:, :-1] > 0, begins[:, :-1], start)
        slots = start.unsqueeze(-1) + torch.arange(-self.memory_length, 0)
        self._cache_index = slots.clamp(min=0).to(self.device)

    def caches(self, line: Tensor) -> Tensor:
        """The cache of each segment: `[batch, history + tokens, ...]` to `[batch, segments, M, ...]`, the newest token last."""
        size, n = self.memory_length, self.segment_length
        if size == 0:
            return line.new_zeros(line.shape[0], self.segments, 0, *line.shape[2:])
        if not self.uniform:
            index = self._cache_index.flatten(1)
            index = index.reshape(*index.shape, *[1] * (line.dim() - 2)).expand(-1, -1, *line.shape[2:])
            return line.gather(1, index).unflatten(1, (self.segments, size))
        first = self.history - self.opened - size
        if first < 0:
            line, first = F.pad(line, (0, 0) * (line.dim() - 2) + (-first, 0)), 0
        if self.segments == 1:
            return line[:, first : first + size].unsqueeze(1)
        line = line[:, first : first + (self.segments - 1) * n + size]
        return line.unfold(1, size, n).movedim(-1, 2)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    plan: CachePlan,
    scale: float | None = None,
    turn: Callable[[Tensor], Tensor] | None = None,
    bias=None,
    use_cache: bool = True,
) -> Tensor:
    """Softmax attention of each token over its segment, causally, and the segment's cache.

    Args:
        q: of the new tokens, `[batch, tokens, heads, d]`.
        k, v: of the line, `[batch, history + tokens, heads, d]`: what a segment sees of itself.
        cached_k, cached_v: the same line, as a cache shows it (without gradient).
        plan: the places of the tokens.
        scale: of the scores; None: 1 / sqrt(d).
        turn: of keys `[batch, segments, keys, heads, d]` of the cache and its segment, by their places from 0 on; None: they stay.
        bias: called with the queries `[rows, heads, queries, d]` and the number of keys; gives the queries that meet the keys,
            and what is added to the scaled scores `[rows, heads, queries, keys]`. The last query stands at the last key.
        use_cache: False hides the cache.

    Returns:
        `[batch, tokens, heads, d]`.
    """
    if plan.alone:
        own, offset = slice(plan.history - plan.opened, None), plan.opened
        q, k, v = q.unsqueeze(1), k[:, own].unsqueeze(1), v[:, own].unsqueeze(1)
    else:
        offset = 0
        q, k, v = (plan.line_to_grid(x) for x in (q, k, v))
    k, v = (torch.cat([plan.caches(old).to(new.dtype), new], dim=2) for old, new in ((cached_k, k), (cached_v, v)))
    queries, keys, size = q.shape[2], k.shape[2], plan.memory_length
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(size + offset)
    if not use_cache:
        seen[:, :size] = False
    if use_cache and plan.cached is not None:
        hidden = F.pad(plan.cached, (0, keys - size), value=True).unsqueeze(2)
        seen = (seen & hidden).expand(q.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1)
    if turn is not None:
        k = turn(k)
    batch = q.shape[0]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    mask = seen
    if bias is not None:
        q, added = bias(q, keys)
        mask = added.masked_fill(~seen, float("-inf")).to(q.dtype)
    attended = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale)
    attended = attended.transpose(1, 2).unflatten(0, (batch, -1))
    return attended.squeeze(1) if plan.alone else plan.grid_to_line(attended)


Table = tuple[Tensor, Tensor]


def cache_positions(plan: CachePlan, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Table, Table]:
    """Rotary tables of the new tokens `[batch or 1, tokens, 1, d / 2]`, and of the places in cache and segment `[M + n, 1, d / 2]`.

    Only distances count: each segment begins at place M.
    """
    here = plan.memory_length + plan.positions[:, plan.history :]
    places = torch.arange(plan.memory_length + plan.segment_length, device=plan.device).unsqueeze(0)
    cos, sin = rotary_table(places, head_dim, theta, dtype)
    return rotary_table(here, head_dim, theta, dtype), (cos.squeeze(0), sin.squeeze(0))
