"""The attention layer with the memory: the cache's attention and what is retrieved, mixed by a gate."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from baselines.cache import CachePlan, cached_attention
from baselines.memorizing.config import MemorizingConfig
from baselines.memorizing.memory import extend, kept, retrieve, weighed
from baselines.memorizing.state import MemorizingLayer
from baselines.transformer_xl.attention import CachedAttention, line_of
from baselines.transformer_xl.attention import project as project_heads
from infini.compiled import Part
from infini.layers.rotary import rotate


class MemorizingAttention(CachedAttention):
    """The layer of arXiv:2203.08913 that retrieves, section 3.1 and 3.2.

    Parameters beside those of `CachedAttention`: beta `[heads]`, gate logits, start at 0; log_scale `[heads]`, the logarithm of
    what scores of unit queries and keys are multiplied with, starts at log(sqrt(d)).
    """

    def __init__(self, config: MemorizingConfig):
        super().__init__(config, relative=False)
        self.project = Part(project, (), *[(0, 1)] * 4)
        self.weigh = Part(weighed, *[(0, 1)] * 3, *[(0, 2)] * 2)
        self.beta = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.log_scale = nn.Parameter(torch.full((config.num_attention_heads,), math.log(config.head_dim) / 2))

    def forward(
        self, x: Tensor, state: MemorizingLayer | None, plan: CachePlan, positions, use_memory: bool, trace: list | None
    ) -> tuple[Tensor, MemorizingLayer]:
        """Attend `x` `[batch, tokens, D]` after `state`.

        Args:
            x: what the layer reads.
            state: what the layer carried so far; None at the start (then `plan.history` is 0).
            plan: the places of the tokens.
            positions: `cache_positions`' tables; the memory knows no positions.
            use_memory: False silences the memory in the mix; it is written all the same.
            trace: a list that receives one dict of detached statistics.

        Returns:
            The layer's output `[batch, tokens, D]` and its new state.
        """
        line = line_of(state, x)
        here, places = positions
        turned, q, k, v, cached_k, cached_v = self.project(self, x, line, *here)
        local = cached_attention(
            turned, k.to(v.dtype), v, cached_k.to(v.dtype), cached_v, plan, scale=1.0, turn=partial(self.turned, places)
        )
        if state is None:
            keys = x.new_zeros(x.shape[0], 0, *k.shape[2:], dtype=self.k_proj.weight.dtype)
            values = torch.zeros_like(keys)
        else:
            keys, values = state.keys, state.values
        with torch.autocast(x.device.type, enabled=False):
            memory = extend(keys, values, k, v, plan)
            mixed = self._mix(q, local, memory, plan, use_memory, trace)
            keys, values = kept(memory, plan, self.config.memory_size)
        return self.o_proj(mixed.to(local.dtype).flatten(2)), MemorizingLayer(plan.recent(line), keys, values)

    def _mix(self, q, local, memory, plan, use_memory, trace) -> Tensor:
        """V_a = g V_m + (1 - g) V_c, g = sigmoid(beta); V_c whole while the memory is empty."""
        if not use_memory or not plan.any_preceded:
            if trace is not None:
                trace.append(self._statistics(None, None))
            return local
        looks = {"plan": plan, "memory_size": self.config.memory_size, "top_k": self.config.top_k, "weigh": self.weigh}
        grid = q.unsqueeze(1) if plan.alone else plan.line_to_grid(q)
        # Copies: where a view begins in its tensor is part of what a compiled graph holds for.
        queries = (part.clone(memory_format=torch.contiguous_format) for part in grid.unbind(1))
        found = [retrieve(part, memory, segment=s, **looks) for s, part in enumerate(queries)]
        found = torch.stack(found, dim=1)
        found = found.squeeze(1) if plan.alone else plan.grid_to_line(found)
        g, local = torch.sigmoid(self.beta.to(q.dtype))[:, None], local.to(q.dtype)
        if trace is not None:
            trace.append(self._statistics(found, local))
        mixed = g * found + (1 - g) * local
        if plan.preceded is None:
            return mixed
        has = plan.preceded.unsqueeze(-1).expand(plan.batch, -1, plan.segment_length)
        return torch.where(plan.grid_to_line(has)[:, :, None, None], mixed, local)

    @torch.no_grad()
    def _statistics(self, found: Tensor | None, local: Tensor | None) -> dict[str, Tensor]:
        """What telemetry wants to know of this call."""
        weight = torch.sigmoid(self.beta.float())
        share = weight.new_zeros(())
        if found is not None:
            retrieved = (weight[:, None] * found).norm()
            share = retrieved / (retrieved + ((1 - weight[:, None]) * local).norm())
        return {"memory_weight": weight, "memory_share": share}


def project(layer: MemorizingAttention, x: Tensor, line: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As in `transformer_xl.attention`, but queries and keys have length 1, in fp32 at least, and queries are times their scale.

    The first are turned queries, in the dtype of the values; then come those that ask the memory.
    """
    q, k, v, cached_k, cached_v = project_heads(layer, x, line, None, None)
    with torch.autocast(x.device.type, enabled=False):
        q = unit(q) * layer.log_scale.exp().to(q.dtype)[:, None]
        k, cached_k = unit(k), unit(cached_k)
    return rotate(q.to(v.dtype), cos, sin), q, k, v, cached_k, cached_v


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in fp32 at least; a vector of zeros stays one."""
    x = x.to(torch.promote_types(torch.float32, x.dtype))
    return torch.nn.functional.normalize(x, dim=-1)
