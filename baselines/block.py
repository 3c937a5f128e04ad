"""The block around every baseline's attention: that of `infini.model`."""

from torch import Tensor, nn

from baselines.config import DecoderConfig
from infini.errors import InputError
from infini.layers.mlp import SwiGLU
from infini.layers.norm import RMSNorm


class Block(nn.Module):
    """Attention and SwiGLU, each in a residual branch with an RMSNorm before it.

    Args:
        config: the model's.
        attention: called with the normalised hidden states and the rest of the block's arguments; gives its output and the
            layer's new state.
    """

    def __init__(self, config: DecoderConfig, attention: nn.Module):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *arguments) -> tuple:
        attended, state = self.attention(self.attention_norm(x), *arguments)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), state


class Heads(nn.Module):
    """The projections of multi-head attention (arXiv:1706.03762).

    Parameters (hidden size D, heads h, head width d): q_proj, k_proj, v_proj `[h d, D]`, o_proj `[D, h d]`, no biases.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)


def require_sdpa(attention: str) -> str:
    """The backend, if it is one of a model whose attention runs through torch alone.

    Raises:
        InputError: it is not.
    """
    if attention not in ("auto", "sdpa"):
        raise InputError(f"the attention backend is {attention!r}; this model has 'sdpa' alone: use 'auto' or 'sdpa'")
    return attention
