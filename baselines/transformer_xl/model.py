"""Transformer-XL: segments in a row, each with a cache of the hidden states before it."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from baselines.block import Block, require_sdpa
from baselines.cache import CachePlan, cache_positions
from baselines.transformer_xl.attention import CachedAttention, sinusoids
from baselines.transformer_xl.config import TransformerXLConfig
from baselines.transformer_xl.state import CacheLayer, CacheState
from infini.compiled import TokenPart
from infini.config import ModelConfig
from infini.decoder import Decoder
from infini.protocol import Carried
from infini.state import StreamState


class PostNormBlock(Block):
    """The published order: branch, sum, norm."""

    def __init__(self, config: TransformerXLConfig, attention: nn.Module):
        super().__init__(config, attention)
        self.finish = TokenPart(finish, 2)

    def forward(self, x: Tensor, *arguments) -> tuple:
        attended, state = self.attention(x, *arguments)
        return self.finish(self, x, attended), state


def finish(block: PostNormBlock, x: Tensor, attended: Tensor) -> Tensor:
    """What a block does after its attention."""
    x = block.attention_norm(x + attended)
    return block.mlp_norm(x + block.mlp(x))


class TransformerXL(Decoder):
    """Decoder with segment recurrence (arXiv:1901.02860).

    Segment borders are the document's: a text fed in any pieces gives the same logits and gradients. `memory=False` hides the
    cache, so that a token sees its own segment only.

    A cache longer than in training: `TransformerXL.from_pretrained(folder, memory_length=2048)`.

    Example:
        >>> model = TransformerXL(TransformerXLConfig(hidden_size=32, num_hidden_layers=2, segment_length=4, memory_length=6))
        >>> tokens = torch.randint(256, (1, 11))
        >>> whole, _ = model(tokens)
        >>> first, state = model(tokens[:, :6])
        >>> rest, _ = model(tokens[:, 6:], state)
        >>> torch.allclose(whole, torch.cat([first, rest], dim=1), atol=1e-5)
        True
    """

    config_class: ClassVar[type[ModelConfig]] = TransformerXLConfig
    state_class: ClassVar[type[StreamState]] = CacheState

    def __init__(self, config: TransformerXLConfig, attention: str = "auto"):
        block, relative = Block if config.norm == "pre" else PostNormBlock, config.positions == "relative"
        super().__init__(config, lambda _: block(config, CachedAttention(config, relative)), require_sdpa(attention))
        if relative:
            heads = (config.num_attention_heads, config.head_dim)
            self.content_bias = nn.Parameter(torch.randn(heads) * config.initializer_range)
            self.position_bias = nn.Parameter(torch.randn(heads) * config.initializer_range)

    def _read(self, tokens, state, reset, lengths, memory, trace) -> tuple[Tensor, CacheState]:
        config, device = self.config, tokens.device
        size = (config.segment_length, config.memory_length)
        plan = CachePlan(tokens.shape[1], *size, state, lengths, reset, tokens.shape[0], device)
        x = self.embedding(tokens)
        dtype = torch.promote_types(torch.float32, x.dtype)
        if config.positions == "relative":
            positions = sinusoids(sum(size), config.hidden_size, config.clamp_length, dtype, device).to(x.dtype)
            biases = (self.content_bias, self.position_bias)
        else:
            positions, biases = cache_positions(plan, config.head_dim, config.rope_theta, dtype), None
        layers = []
        for block, old in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, new = self._run(block, x, old, plan, positions, biases, memory)
            layers.append(new)
        if trace is not None:
            trace["layers"] = [None] * len(layers)
        return x, CacheState(tuple(layers), plan.open_length, plan.tokens_seen, self.state_shape)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> CacheState:
        """The state of `batch_size` streams that have read nothing; calling with None in its place gives the same."""
        like = self.embedding.weight
        shape = (batch_size, self._line, self.config.hidden_size)
        layers = [CacheLayer(torch.zeros(shape, dtype=like.dtype, device=device or like.device)) for _ in self.blocks]
        zeros = torch.zeros(batch_size, dtype=torch.long)
        return CacheState(tuple(layers), zeros, zeros.clone(), self.state_shape)

    def state_bytes(self, tokens: int, batch_size: int = 1) -> int:
        """Bytes of the state, the same for any number of tokens.

        Per layer `hidden_size` numbers for each of memory_length + segment_length - 1 tokens (cache and open segment); 16 bytes
        of counters.
        """
        numbers = self.config.num_hidden_layers * self._line * self.config.hidden_size
        return batch_size * (numbers * self.embedding.weight.element_size() + 16)

    def carried(self, tokens: int) -> Carried:
        """What crosses the border behind a row's first `tokens` tokens, a multiple of `segment_length`: the cache.

        Per layer `hidden_size` numbers for each of the last `memory_length` tokens. Table 1 of arXiv:2404.07143 counts the keys and
        values that are made of them, (d_k + d_v) H for each: twice as many where the heads together are `hidden_size` wide.

        Example:
            >>> model = TransformerXL(TransformerXLConfig(hidden_size=32, num_hidden_layers=2, segment_length=4, memory_length=6))
            >>> [model.carried(tokens).numbers for tokens in (4, 8, 800)]
            [256, 384, 384]
        """
        numbers = self.config.num_hidden_layers * min(tokens, self.config.memory_length) * self.config.hidden_size
        return Carried(numbers, numbers * self.embedding.weight.element_size())

    def parameter_groups(self) -> dict[str, list[str]]:
        """As in `Decoder`; u and v are vectors, one a head, and do not decay."""
        groups = super().parameter_groups()
        biases = [name for name in groups["decay"] if name.endswith("_bias")]
        groups["decay"] = [name for name in groups["decay"] if name not in biases]
        groups["no_decay"] += biases
        return groups

    @property
    def _line(self) -> int:
        return self.config.memory_length + self.config.segment_length - 1
