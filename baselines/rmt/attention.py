"""Attention within one segment and its memory tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.block import RotaryHeads


class SegmentAttention(RotaryHeads):
    """Multi-head attention with rotary positions under a given mask.
    """

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: Tensor) -> tuple[Tensor, None]:
        """Attend `x` `[batch, tokens, D]`; `seen` is bool `[tokens, tokens]`. A layer by itself carries nothing on."""
        q, k, v = self.project(self, x, *rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)), None


def visible(memory: int, text: int, write: int, device: torch.device) -> Tensor:
    """Who sees whom among `memory` read tokens, `text` tokens and `write` write tokens: bool, rows see columns.

    Memory tokens see each other; the text sees the read tokens and itself, causally; the write tokens see everything.

    Example:
        >>> visible(1, 2, 1, torch.device("cpu")).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    total = memory + text + write
    seen = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    seen[:memory, :memory] = True
    seen[memory + text :] = True
    return seen
