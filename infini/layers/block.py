"""The residual block of every decoder here."""

from typing import Any

from torch import Tensor, nn

from infini.compiled import TokenPart
from infini.layers.mlp import SwiGLU
from infini.layers.norm import RMSNorm


class Block(nn.Module):
    """Attention and SwiGLU, each in a residual branch with an RMSNorm before it.

    Args:
        config: the model's.
        attention: called with the normalised hidden states and the rest of the block's arguments; gives its output and the
            layer's new state.
    """

    def __init__(self, config: Any, attention: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.finish = TokenPart(finish, 2)

    def forward(self, x: Tensor, *arguments) -> tuple:
        attended, state = self.attention(self.attention_norm(x), *arguments)
        return self.finish(self, x, attended), state


def finish(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """What a block does after its attention."""
    x = x + attended
    return x + block.mlp(block.mlp_norm(x))
