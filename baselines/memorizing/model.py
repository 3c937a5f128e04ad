"""Memorizing Transformer: Transformer-XL with rotary positions, and a memory of keys and values in one layer."""

from typing import ClassVar

import torch

from baselines.block import Block, require_sdpa
from baselines.cache import CachePlan, cache_positions
from baselines.memorizing.attention import MemorizingAttention
from baselines.memorizing.config import MemorizingConfig
from baselines.memorizing.state import MemorizingLayer, MemorizingState
from baselines.transformer_xl.attention import CachedAttention
from infini.config import ModelConfig
from infini.decoder import Decoder
from infini.protocol import Carried
from infini.state import StreamState


class MemorizingTransformer(Decoder):
    """Decoder with exact retrieval of past keys and values (arXiv:2203.08913).

    A segment's queries retrieve from the tokens of their document before the segment, the last `memory_size` of them. Segment
    borders are the document's: a text fed in any pieces gives the same logits and gradients. `memory=False` silences the memory
    and leaves the caches.

    Another size at evaluation: `MemorizingTransformer.from_pretrained(folder, memory_size=65536)`.

    Example:
        >>> model = MemorizingTransformer(MemorizingConfig(hidden_size=32, num_hidden_layers=2, segment_length=4, memory_size=6))
        >>> _, short = model(torch.zeros(1, 3, dtype=torch.long))
        >>> _, long = model(torch.zeros(1, 100, dtype=torch.long))
        >>> [0 if layer.keys is None else layer.keys.shape[1] for layer in (*short.layers, *long.layers)]
        [0, 0, 0, 6]
    """

    config_class: ClassVar[type[ModelConfig]] = MemorizingConfig
    state_class: ClassVar[type[StreamState]] = MemorizingState
    memory_parameters: ClassVar[tuple[str, ...]] = ("beta", "log_scale")

    def __init__(self, config: MemorizingConfig, attention: str = "auto"):
        def block(layer: int) -> Block:
            retrieves = layer == config.memory_layer
            return Block(config, MemorizingAttention(config) if retrieves else CachedAttention(config, relative=False))

        super().__init__(config, block, require_sdpa(attention))

    def _read(self, tokens, state, reset, lengths, memory, trace) -> tuple[torch.Tensor, MemorizingState]:
        config, device = self.config, tokens.device
        size = (config.segment_length, config.memory_length)
        plan = CachePlan(tokens.shape[1], *size, state, lengths, reset, tokens.shape[0], device)
        x = self.embedding(tokens)
        positions = cache_positions(plan, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
        statistics: list = []
        layers = []
        for i, block in enumerate(self.blocks):
            old = None if state is None else state.layers[i]
            if i == config.memory_layer:
                x, new = self._run(block, x, old, plan, positions, memory, None if trace is None else statistics)
            else:
                x, new = self._run(block, x, old, plan, positions, None, True)
                new = MemorizingLayer(new.hidden)
            layers.append(new)
        if trace is not None:
            trace["layers"] = [statistics[0] if i == config.memory_layer else None for i in range(len(layers))]
        return x, MemorizingState(tuple(layers), plan.open_length, plan.tokens_seen, self.state_shape)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> MemorizingState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        config, like = self.config, self.embedding.weight
        like = torch.empty(0, dtype=like.dtype, device=device or like.device)
        layers = []
        for i in range(config.num_hidden_layers):
            keys = None
            if i == config.memory_layer:
                keys = like.new_zeros(batch_size, 0, config.num_attention_heads, config.head_dim)
            layers.append(MemorizingLayer(like.new_zeros(batch_size, self._line, config.hidden_size), keys, keys))
        zeros = torch.zeros(batch_size, dtype=torch.long)
        return MemorizingState(tuple(layers), zeros, zeros.clone(), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state after `tokens` tokens of every row.

        Per layer `hidden_size` numbers for each of memory_length + segment_length - 1 tokens (cache and open segment); in one
        layer 2 heads head_dim numbers for each token of the full segments, at most memory_size; 16 bytes of counters.
        """
        config = self.config
        entries = min(config.memory_size, tokens // config.segment_length * config.segment_length)
        numbers = config.num_hidden_layers * self._line * config.hidden_size
        numbers += 2 * entries * config.num_attention_heads * config.head_dim
        return batch_size * (numbers * self.embedding.weight.element_size() + 16)

    def carried(self, tokens: int) -> Carried:
        """What crosses the border behind a row's first `tokens` tokens, a multiple of `segment_length`: caches and memory.

        Per layer `hidden_size` numbers for each of the last `memory_length` tokens (arXiv:2404.07143 counts them as
        `TransformerXL.carried` says), and in one layer 2 heads head_dim for each of the last `memory_size`, its (d_k + d_v) H.

        Example:
            >>> model = MemorizingTransformer(MemorizingConfig(hidden_size=32, num_hidden_layers=2, segment_length=4, memory_size=6))
            >>> [model.carried(tokens).numbers for tokens in (4, 8, 800)]
            [512, 640, 640]
        """
        config = self.config
        numbers = config.num_hidden_layers * min(tokens, config.memory_length) * config.hidden_size
        numbers += 2 * min(tokens, config.memory_size) * config.num_attention_heads * config.head_dim
        return Carried(numbers, numbers * self.embedding.weight.element_size())

    @property
    def _line(self) -> int:
        return self.config.memory_length + self.config.segment_length - 1
