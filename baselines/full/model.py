"""A LLaMA-like decoder with plain causal attention: the whole text, or a sliding window."""

import copy
from typing import ClassVar

import torch

from baselines.block import Block
from baselines.full.attention import FullAttention, plan_of_text
from baselines.full.config import FullConfig
from baselines.full.state import FullLayer, FullState
from infini.config import ModelConfig
from infini.decoder import Decoder
from infini.errors import InputError
from infini.layers.rotary import rotary_table
from infini.local import announce_backend, choose_backend
from infini.protocol import Carried
from infini.segments import SegmentPlan
from infini.state import StreamState


class FullTransformer(Decoder):
    """Decoder with plain attention. Its state is the cache of keys and values, and grows with the text (or to the window).

    `memory=False` hides what stands before a token's own segment, counted in `segment_length` from the document's start: what
    is lost then is what the text before the segment is worth.

    Example:
        >>> model = FullTransformer(FullConfig(hidden_size=32, num_hidden_layers=2, segment_length=4))
        >>> [model(torch.zeros(1, n, dtype=torch.long))[1].nbytes for n in (10, 20)]  # a cache grows with the text
        [5128, 10248]
    """

    config_class: ClassVar[type[ModelConfig]] = FullConfig
    state_class: ClassVar[type[StreamState]] = FullState

    def __init__(self, config: FullConfig, attention: str = "auto"):
        if attention == "eager":
            raise InputError("the attention backend is 'eager', which this model does not have: use 'auto', 'flash' or 'sdpa'")
        super().__init__(config, lambda _: Block(config, FullAttention(config)), attention)

    def _read(self, tokens, state, reset, lengths, memory, trace) -> tuple[torch.Tensor, FullState]:
        config, device, length = self.config, tokens.device, tokens.shape[1]
        held = 0 if state is None else state.layers[0].keys.shape[1]
        plan = plan_of_text(tokens, config.window or held + length + 1, config.segment_length, held, state, lengths, reset)
        positions = plan.positions[:, held:]
        near = plan if memory else _own_segment(plan, positions, config.segment_length)
        x = self.embedding(tokens)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        backend = choose_backend(self.attention_backend, device.type, dtype, self.config.window is not None)
        announce_backend(backend, device.type, dtype)
        rotary = rotary_table(positions, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
        layers = []
        for block, old in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, new = self._run(block, x, old, plan, near, rotary, backend)
            layers.append(new)
        if trace is not None:
            trace["layers"] = [None] * len(layers)
        return x, FullState(tuple(layers), plan.tokens_seen, self.state_shape)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> FullState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        config, like = self.config, self.embedding.weight
        shape = (batch_size, 0, config.num_attention_heads, config.head_dim)
        nothing = torch.zeros(shape, dtype=like.dtype, device=device or like.device)
        layers = tuple(FullLayer(nothing, nothing) for _ in self.blocks)
        return FullState(layers, torch.zeros(batch_size, dtype=torch.long), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens of every row.

        Per layer 2 heads head_dim numbers for each token, of the last window - 1 with a window; 8 bytes of counters.
        """
        return batch_size * (self.carried(tokens).bytes + 8)

    def carried(self, tokens: int) -> Carried:
        """What crosses a border behind a row's first `tokens` tokens, any number: 2 heads head_dim numbers a token and layer.

        Example:
            >>> shape = dict(hidden_size=32, num_hidden_layers=2)
            >>> [FullTransformer(FullConfig(**shape, window=window)).carried(800).numbers for window in (None, 9)]
            [102400, 1024]
        """
        config = self.config
        kept = tokens if config.window is None else min(tokens, config.window - 1)
        numbers = config.num_hidden_layers * kept * 2 * config.num_attention_heads * config.head_dim
        return Carried(numbers, numbers * self.embedding.weight.element_size())


def _own_segment(plan: SegmentPlan, positions: torch.Tensor, segment_length: int) -> SegmentPlan:
    """The plan of tokens that see nothing before their segment."""
    near = copy.copy(plan)
    start = plan.history + torch.arange(plan.tokens, device=plan.device) - positions % segment_length
    near.uniform, near.earliest = False, plan.earliest.maximum(start)
    return near
