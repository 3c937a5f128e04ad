"""Recurrent Memory Transformer: segments in a row, the last outputs of some tokens being the first inputs of the next segment's."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from baselines.block import Block, require_sdpa
from baselines.rmt.attention import SegmentAttention, visible
from baselines.rmt.config import RMTConfig
from baselines.rmt.state import RMTLayer, RMTState
from infini.config import ModelConfig
from infini.decoder import Decoder
from infini.layers.rotary import rotary_table
from infini.protocol import Carried
from infini.segments import SegmentPlan
from infini.state import StreamState


class RecurrentMemoryTransformer(Decoder):
    """Decoder with memory tokens (arXiv:2207.06881).

    Each segment is read between copies of the memory, `[memory; text; memory]`; what the last layer gives at the second copy is
    the memory of the next segment. Segments are computed one after the other, and gradients flow through all of a call's. The
    open segment's tokens are in the state and are read again with each call, so that a text fed in any pieces gives the same
    logits and gradients. `memory=False` gives every segment the memory of a document's start.

    Example:
        >>> model = RecurrentMemoryTransformer(RMTConfig(hidden_size=32, num_hidden_layers=1, segment_length=4))
        >>> _, short = model(torch.zeros(1, 9, dtype=torch.long))
        >>> _, long = model(torch.zeros(1, 900, dtype=torch.long))
        >>> short.nbytes == long.nbytes == model.state_bytes(900)
        True
    """

    config_class: ClassVar[type[ModelConfig]] = RMTConfig
    state_class: ClassVar[type[StreamState]] = RMTState

    def __init__(self, config: RMTConfig, attention: str = "auto"):
        super().__init__(config, lambda _: Block(config, SegmentAttention(config)), require_sdpa(attention))
        self.initial_memory = nn.Parameter(torch.randn(config.num_memory_tokens, config.hidden_size) * config.initializer_range)

    def _read(self, tokens, state, reset, lengths, memory, trace) -> tuple[Tensor, RMTState]:
        config, device, batch = self.config, tokens.device, tokens.shape[0]
        zeros = torch.zeros(batch, dtype=torch.long)
        empty = torch.ones(batch, dtype=torch.bool) if state is None else state.empty
        plan = SegmentPlan(
            tokens=tokens.shape[1],
            segment_length=config.segment_length,
            span=config.segment_length,
            sliding=False,
            open_length=zeros if state is None else state.open_length,
            tokens_seen=zeros if state is None else state.tokens_seen,
            empty=empty,
            history=0 if state is None else config.segment_length - 1,
            lengths=lengths,
            reset=reset,
            device=device,
        )
        line = tokens if state is None else torch.cat([state.layers[0].tokens, tokens], dim=1)
        grid = plan.line_to_grid(line)
        initial = self.initial_memory.expand(batch, -1, -1)
        carried = initial if state is None else _where(empty, initial, state.layers[0].memory)
        places = torch.arange(config.segment_length + 2 * config.num_memory_tokens, device=device).unsqueeze(0)
        dtype = torch.promote_types(torch.float32, self.embedding.weight.dtype)
        rotary = rotary_table(places, config.head_dim, config.rope_theta, dtype)
        seen = visible(config.num_memory_tokens, config.segment_length, config.num_memory_tokens, device)
        read = []
        for s in range(plan.segments):
            if plan.fresh is not None:
                carried = _where(plan.fresh[:, s], initial, carried)
            text = grid[:, s]
            if plan.uniform:
                text = text[:, : plan.opened + plan.tokens - s * config.segment_length]
            x, written = self._read_segment(carried if memory else initial, text, rotary, seen)
            read.append(x)
            if text.shape[1] == config.segment_length:
                carried = written if plan.written is None else _where(plan.written[:, s], written, carried)
        x = torch.cat(read, dim=1)
        if plan.uniform:
            x = x[:, plan.opened :]
        else:
            x = plan.grid_to_line(x.unflatten(1, (plan.segments, -1)))
        if trace is not None:
            trace["layers"] = [None] * config.num_hidden_layers
        carried = _where(plan.empty, torch.zeros_like(carried), carried.to(self.initial_memory.dtype))
        layer = RMTLayer(carried, plan.recent(line))
        return x, RMTState((layer,), plan.open_length, plan.tokens_seen, plan.empty, self.state_shape)

    def _read_segment(self, memory: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor], seen: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks give for a segment's tokens, and the memory that it writes (of use only if the segment is full)."""
        size, length = memory.shape[1], text.shape[1]
        x = self.embedding(text)
        # Without write tokens the text's outputs are the same: it does not see them.
        write = size if length == self.config.segment_length else 0
        x = torch.cat([memory.to(x.dtype), x, memory[:, :write].to(x.dtype)], dim=1)
        total = x.shape[1]
        rotary, seen = tuple(part[:, :total] for part in rotary), seen[:total, :total]
        for block in self.blocks:
            x, _ = self._run(block, x, rotary, seen)
        return x[:, size : size + length], self.norm(x[:, size + length :])

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> RMTState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        device = device or self.initial_memory.device
        memory = torch.zeros(batch_size, *self.initial_memory.shape, dtype=self.initial_memory.dtype, device=device)
        tokens = torch.zeros(batch_size, self.config.segment_length - 1, dtype=torch.long, device=device)
        zeros = torch.zeros(batch_size, dtype=torch.long)
        empty = torch.ones(batch_size, dtype=torch.bool)
        return RMTState((RMTLayer(memory, tokens),), zeros, zeros.clone(), empty, self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state, the same for any number of tokens.

        `hidden_size` numbers for each memory token; 8 bytes for each of segment_length - 1 tokens; 17 bytes of counters.
        """
        numbers = self.initial_memory.numel() * self.initial_memory.element_size()
        return batch_size * (numbers + 8 * (self.config.segment_length - 1) + 17)

    def carried(self, tokens: int) -> Carried:
        """What crosses the border behind a row's first `tokens` tokens, a multiple of `segment_length`: the memory tokens.

        `hidden_size` numbers for each, once: they enter below the first layer. Table 1 of arXiv:2404.07143 has 2 l times as many.

        Example:
            >>> shape = dict(hidden_size=32, num_hidden_layers=2, segment_length=4)
            >>> RecurrentMemoryTransformer(RMTConfig(**shape, num_memory_tokens=3)).carried(800)
            Carried(numbers=96, bytes=384)
        """
        numbers = self.initial_memory.numel() if tokens >= self.config.segment_length else 0
        return Carried(numbers, numbers * self.initial_memory.element_size())


def _where(rows: Tensor, there: Tensor, elsewhere: Tensor) -> Tensor:
    """`[batch, ...]`: the one in the rows that the bool tensor `[batch]` names, the other in the rest."""
    if rows.device.type == "cpu" and not bool(rows.any()):
        return elsewhere
    return torch.where(rows.to(there.device)[:, None, None], there, elsewhere.to(there.dtype))
