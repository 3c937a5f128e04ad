"""Plain attention that writes on: the yardstick of decoding, with a cache of keys and values as large as the text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infini.attention import project
from infini.layers.rotary import rotary_table, rotate
from infini.model import InfiniTransformer


class PlainStep:
    """One token more for a decoder without memory, over a cache that was allocated once.

    As fast as torch's own attention makes it: nothing is concatenated, keys are kept with their positions, and the fused kernel
    sees what is filled of the cache without a mask.

    Args:
        model: without memory layers; its sliding window is ignored, every token sees all before it.
        capacity: tokens that the cache holds.
        rows: texts.

    Example:
        >>> from infini import InfiniConfig
        >>> config = InfiniConfig(hidden_size=32, num_hidden_layers=1, memory_layers=(), local_attention="sliding", segment_length=9)
        >>> model, text = InfiniTransformer(config), torch.tensor([[3, 1, 4, 1, 5]])
        >>> step = PlainStep(model, capacity=5)
        >>> with torch.no_grad():
        ...     logits = [step.step(text[:, i], i) for i in range(5)]
        ...     whole, _ = model(text)
        >>> torch.allclose(torch.stack(logits, 1), whole, atol=1e-5)
        True
    """

    def __init__(self, model: InfiniTransformer, capacity: int, rows: int = 1):
        self.model, config, like = model, model.config, model.embedding.weight
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.caches = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in model.blocks]
        self.inputs = [like.new_zeros(rows, config.short_conv, config.hidden_size) for _ in model.blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, and of what a short convolution reaches back to."""
        return sum(tensor.nbytes for tensor in self.caches + self.inputs)

    @torch.no_grad()
    def step(self, tokens: Tensor, place: int) -> Tensor:
        """Read the tokens `[rows]` that stand at `place`, after all that the cache holds in front of it; logits `[rows, vocab]`."""
        model, config = self.model, self.model.config
        x = model.embedding(tokens.unsqueeze(1))
        here = torch.full((1, 1), place, device=x.device)
        rotary = rotary_table(here, config.head_dim, config.rope_theta, torch.promote_types(torch.float32, x.dtype))
        grouped = config.num_key_value_heads != config.num_attention_heads
        for block, (keys, values), inputs in zip(model.blocks, self.caches, self.inputs, strict=True):
            layer, normed, before = block.attention, block.attention_norm(x), None
            if config.short_conv:
                before = inputs.clone()
                inputs.copy_(torch.cat([before, normed], dim=1)[:, 1:])
            q, k, v, _ = project(layer, normed, before, None)
            keys[:, :, place : place + 1] = rotate(k, *rotary).transpose(1, 2)
            values[:, :, place : place + 1] = v.transpose(1, 2)
            seen = (cache[:, :, : place + 1] for cache in (keys, values))
            attended = F.scaled_dot_product_attention(rotate(q, *rotary).transpose(1, 2), *seen, enable_gqa=grouped)
            x = x + layer.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return model.head(model.norm(x))[:, 0]
