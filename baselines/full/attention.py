"""Causal softmax attention over the whole document or its last `window` tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.block import RotaryHeads
from baselines.full.state import FullLayer
from infini.local import local_attention
from infini.segments import SegmentPlan
from infini.state import StreamState

# Queries that share one mask where rows differ.
QUERIES = 256


def plan_of_text(
    tokens: Tensor, span: int, segment_length: int, held: int, state: StreamState | None, lengths: Tensor | None, reset: Tensor | None
) -> SegmentPlan:
    """The places of `tokens` `[batch, length]` for models that write no segments: each token sees the last `span`, itself included.

    Args:
        tokens, lengths, reset: as a model is given them.
        span: more than the text has for attention over everything.
        segment_length: of the model.
        held: tokens whose keys and values the state holds.
        state: the state before the tokens; None at the start.
    """
    batch, length = tokens.shape
    zeros = torch.zeros(batch, dtype=torch.long)
    return SegmentPlan(
        tokens=length,
        segment_length=segment_length,
        span=span,
        sliding=True,
        open_length=zeros,
        tokens_seen=zeros if state is None else state.tokens_seen,
        empty=torch.ones(batch, dtype=torch.bool),
        history=held,
        lengths=lengths,
        reset=reset,
        device=tokens.device,
    )


class FullAttention(RotaryHeads):
    """Multi-head attention (arXiv:1706.03762) with rotary positions (arXiv:2104.09864).
    """

    def forward(
        self, x: Tensor, state: FullLayer | None, plan: SegmentPlan, near: SegmentPlan, rotary, backend: str
    ) -> tuple[Tensor, FullLayer]:
        """Attend `x` `[batch, tokens, D]` after `state`.

        Args:
            x: normalised hidden states.
            state: the layer's keys and values so far; None at the start (then `plan.history` is 0).
            plan: the places of the tokens.
            near: the plan, or a copy of it that says otherwise what a token sees.
            rotary: cosines and sines of the new tokens.
            backend: `flash` or `sdpa`.

        Returns:
            The layer's output `[batch, tokens, D]` and its new state.
        """
        q, k, v = self.project(self, x, *rotary)
        if state is not None:
            k, v = (torch.cat([old.to(new.dtype), new], dim=1) for old, new in ((state.keys, k), (state.values, v)))
        if self.config.window is not None or (near.uniform and backend == "flash"):
            attended = local_attention(q, k, v, near, backend)
        elif near.uniform:
            start = near.history - near.visible
            attended = _causal(q, k[:, start:], v[:, start:])
        else:
            attended = _masked(q, k, v, near)
        kept = int(plan.tokens_seen.max())
        stored = self.k_proj.weight.dtype
        recent = (plan.recent(y)[:, max(0, plan.span - 1 - kept) :].to(stored) for y in (k, v))
        return self.o_proj(attended.flatten(2)), FullLayer(*recent)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query stands at the last key."""
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if queries in (1, keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1).transpose(1, 2)
    from torch.nn.attention.bias import causal_lower_right  # here, because it imports the compiler: seconds

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(queries, keys)).transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan) -> Tensor:
    """Rows that see different stretches, some queries at a time: a mask of all would be the square of the text."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    key, found = torch.arange(k.shape[2], device=q.device), []
    for start in range(0, plan.tokens, QUERIES):
        stop = min(start + QUERIES, plan.tokens)
        reach = plan.history + stop
        last = torch.arange(plan.history + start, reach, device=q.device)[:, None]
        seen = (key[:reach] >= plan.earliest[:, start:stop, None]) & (key[:reach] <= last)
        part = (q[:, :, start:stop], k[:, :, :reach], v[:, :, :reach])
        found.append(F.scaled_dot_product_attention(*part, attn_mask=seen.unsqueeze(1)))
    return torch.cat(found, dim=2).transpose(1, 2)
