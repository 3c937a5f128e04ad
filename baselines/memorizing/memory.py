"""The memory: a line of keys and values in the order of the text, which segments look into and full segments join.

Entries are known by document and position, so that resets and eviction are comparisons and nothing is ever cleared: a segment
may retrieve the `memory_size` tokens of its document that stand before its first one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from baselines.cache import CachePlan

# Scores that are held at a time while the memory is searched.
SCORES = 2**27


class MemoryLine(NamedTuple):
    """Keys and values `[batch, entries, heads, d]`, and of each entry `[batch or 1, entries]` its document and its position."""

    keys: Tensor
    values: Tensor
    document: Tensor
    position: Tensor
    old: int
    """Entries that come from the state; those of the call's segments follow."""


def extend(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, plan: CachePlan) -> MemoryLine:
    """The state's memory and the call's full segments in one line.

    Args:
        keys, values: of the state.
        k, v: of the line `[batch, history + tokens, heads, d]`, keys as they are stored.
        plan: the places of the tokens.
    """
    old, n = keys.shape[1], plan.segment_length
    position = plan.before[:, :1] + torch.arange(-old, 0)
    document = torch.zeros_like(position)
    filled = int(plan.committed.max())
    if filled:
        new = (plan.line_to_grid(x)[:, :filled].flatten(1, 2).detach().to(keys.dtype) for x in (k, v))
        keys, values = (torch.cat(pair, dim=1) for pair in zip((keys, values), new, strict=True))
        starts, documents = (x[:, :filled].unsqueeze(-1) for x in (plan.before, plan.document))
        position = torch.cat([position, (starts + torch.arange(n)).flatten(1)], dim=1)
        document = torch.cat([document, documents.expand(-1, -1, n).flatten(1)], dim=1)
    return MemoryLine(keys, values, document, position, old)


def kept(line: MemoryLine, plan: CachePlan, memory_size: int) -> tuple[Tensor, Tensor]:
    """The memory after the call: of each row the newest entries, as many as its longest row has or `memory_size`."""
    size = min(memory_size, int((plan.tokens_seen - plan.open_length).max()))
    ends = line.old + plan.committed * plan.segment_length
    if size == line.old == line.keys.shape[1]:
        return line.keys, line.values
    if bool((ends == ends[0]).all()):
        place = slice(int(ends[0]) - size, int(ends[0]))
        return line.keys[:, place].clone(), line.values[:, place].clone()
    index = (ends[:, None] + torch.arange(-size, 0)).clamp(min=0).to(line.keys.device)
    index = index[:, :, None, None].expand(-1, -1, *line.keys.shape[2:])
    return line.keys.gather(1, index), line.values.gather(1, index)


def retrieve(
    q: Tensor, line: MemoryLine, plan: CachePlan, segment: int, memory_size: int, top_k: int, weigh: Callable[..., Tensor] | None = None
) -> Tensor:
    """V_m: softmax attention over the `top_k` entries with the largest scores, exactly.

    Args:
        q: queries of one segment, `[batch, queries, heads, d]`, with their scale; scores are computed in their dtype.
        line: what the call can look into.
        plan: the places of the tokens.
        segment: which segment the queries are of.
        memory_size, top_k: as in `MemorizingConfig`.
        weigh: in place of `weighed`, which it is in another form; None: `weighed`.

    Returns:
        `[batch, queries, heads, d]`; zeros where nothing can be retrieved. The memory receives no gradient.
    """
    before, document = plan.before[:, segment, None], plan.document[:, segment, None]
    allowed = (line.document == document) & (line.position < before) & (line.position >= (before - memory_size).clamp(min=0))
    # Only the stretch that some row may look into.
    some = allowed.any(dim=0).nonzero().flatten()
    if len(some) == 0:
        return torch.zeros_like(q)
    first, stop = int(some[0]), int(some[-1]) + 1
    allowed = allowed[:, first:stop]
    allowed = None if bool(allowed.all()) else allowed.to(q.device)
    chosen = search(q.detach(), line.keys[:, first:stop], allowed, top_k)
    hidden = None
    if allowed is not None:
        hidden = ~allowed.expand(len(q), -1)[:, None, None].expand(*chosen.shape[:3], -1).gather(-1, chosen)
    return (weigh or weighed)(q, line.keys, line.values, chosen + first, hidden)


def weighed(q: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax attention of queries `[batch, queries, heads, d]` over some entries of a memory, of each head its own.

    Args:
        q: with their scale; scores are computed in their dtype.
        keys, values: `[batch, entries, heads, d]`, without gradient.
        chosen: indices of entries `[batch, heads, queries, k]`.
        hidden: bool, alike, those that count for nothing; None: none.

    Returns:
        Like `q`; zeros for a query all of whose entries are hidden.
    """
    scores = (q.transpose(1, 2).unsqueeze(-2) * _take(keys, chosen).to(q.dtype)).sum(dim=-1)
    if hidden is None:
        weight = scores.softmax(dim=-1)
    else:
        # A row without a memory gets weights of zero, not those of a softmax over nothing.
        weight = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(hidden, 0)
    return (weight.unsqueeze(-1) * _take(values, chosen).to(q.dtype)).sum(dim=-2).transpose(1, 2)


@torch.no_grad()
def search(q: Tensor, keys: Tensor, allowed: Tensor | None, top_k: int, scores_held: int = SCORES) -> Tensor:
    """Indices `[batch, heads, queries, min(top_k, entries)]` of the entries with the largest q.k.

    The memory is gone through in pieces, and each piece's best are compared with the best so far: exact, in bounded room.

    Args:
        q: `[batch, queries, heads, d]`.
        keys: `[batch, entries, heads, d]`.
        allowed: bool `[batch or 1, entries]`, which entries may be chosen while there are others; None: all.
        top_k: how many.
        scores_held: most scores that are computed at a time.

    Example:
        >>> keys = torch.tensor([0.1, 0.9, 0.5, 0.7]).reshape(1, 4, 1, 1)
        >>> search(torch.ones(1, 1, 1, 1), keys, None, top_k=2, scores_held=1).sort().values.flatten().tolist()
        [1, 3]
    """
    batch, queries, heads, _ = q.shape
    piece = max(top_k, scores_held // (batch * heads * queries))
    q, best, chosen = q.transpose(1, 2), None, None
    for start in range(0, keys.shape[1], piece):
        part = slice(start, start + piece)
        scores = q @ keys[:, part].permute(0, 2, 3, 1).to(q.dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None, None, part], float("-inf"))
        found, index = largest(scores, min(top_k, scores.shape[-1]))
        index = index + start
        if best is not None:
            found, index = torch.cat([best, found], dim=-1), torch.cat([chosen, index], dim=-1)
            found, order = found.topk(min(top_k, found.shape[-1]), dim=-1)
            index = index.gather(-1, order)
        best, chosen = found, index
    return chosen


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `scores.topk(count)` gives, in any order among equals.

    Of groups of scores the `count` with the largest maxima hold the `count` largest scores, so only those are sorted out: `topk` over
    everything goes through all scores many times.

    Example:
        >>> scores = torch.arange(1000.0).roll(300)
        >>> largest(scores, 3)[0].sort().values.tolist(), largest(scores, 3)[1].sort().values.tolist()
        ([997.0, 998.0, 999.0], [297, 298, 299])
    """
    # As many groups as there will be candidates.
    size = math.isqrt(scores.shape[-1] // count)
    groups = scores.shape[-1] // max(1, size)
    if size < 2 or groups <= count:
        return scores.topk(count, dim=-1)
    # A group is every groups-th score, so that neighbors are read together; what is left over are candidates too.
    grouped = scores[..., : size * groups].unflatten(-1, (size, groups))
    chosen = grouped.amax(dim=-2).topk(count, dim=-1).indices.unsqueeze(-2).expand(*scores.shape[:-1], size, -1)
    places = (chosen + groups * torch.arange(size, device=scores.device).unsqueeze(-1)).flatten(-2)
    rest = torch.arange(size * groups, scores.shape[-1], device=scores.device).expand(*scores.shape[:-1], -1)
    places = torch.cat([places, rest], dim=-1)
    found, index = scores.gather(-1, places).topk(count, dim=-1)
    return found, places.gather(-1, index)


def _take(entries: Tensor, chosen: Tensor) -> Tensor:
    """`[batch, entries, heads, d]` at `[batch, heads, queries, k]`, each head its own: `[batch, heads, queries, k, d]`."""
    batch, heads = chosen.shape[:2]
    rows = torch.arange(batch, device=chosen.device)[:, None, None, None]
    return entries[rows, chosen, torch.arange(heads, device=chosen.device)[:, None, None]]
